"""Rotary positions of a grid: rows and columns turn halves of each head."""

import itertools

import pytest
import torch

from genscale.models.grid_rotary import GridRotary
from genscale.models.rotary import rotate

CPU = torch.device("cpu")


def test_pairs_turn_by_row_then_by_column_times_frequency():
    width, base, rows, columns = 12, 50.0, 3, 4
    x = torch.randn(2, 5, rows * columns, width, dtype=torch.float64)
    turned = rotate(x, GridRotary(width, base)(rows, columns, CPU, torch.float64))
    as_complex, found = (torch.complex(y[..., : width // 2], y[..., width // 2 :]) for y in (x, turned))
    for row in range(rows):
        for column in range(columns):
            token = row * columns + column
            angles = [place * base ** (-pair / 3) for place in (row, column) for pair in range(3)]
            expected = as_complex[:, :, token] * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
            torch.testing.assert_close(found[:, :, token], expected, atol=1e-5, rtol=0)  # angles are float32


def test_scores_depend_on_the_differences_of_rows_and_columns_alone():
    rows, columns, width = 6, 5, 16
    query, key = torch.randn(2, 1, 1, 1, width).expand(2, 1, 1, rows * columns, width)
    rotation = GridRotary(width)(rows, columns, CPU, torch.float32)
    scores = rotate(query, rotation)[0, 0] @ rotate(key, rotation)[0, 0].T  # (tokens, tokens)
    by_difference = {}
    for one in range(rows * columns):
        for other in range(rows * columns):
            difference = one // columns - other // columns, one % columns - other % columns
            by_difference.setdefault(difference, []).append(scores[one, other].item())
    assert len(by_difference) == (2 * rows - 1) * (2 * columns - 1)
    for found in by_difference.values():
        assert found == pytest.approx([found[0]] * len(found), abs=1e-4)
    firsts = sorted(found[0] for found in by_difference.values())
    assert all(later - earlier > 1e-6 for earlier, later in itertools.pairwise(firsts))  # all differ


def test_a_larger_grid_begins_as_a_smaller_one():
    rotary = GridRotary(8)
    small, large = rotary(2, 3, CPU, torch.float32), rotary(4, 5, CPU, torch.float32)
    for one, other in zip(small, large, strict=True):
        assert torch.equal(one.view(2, 3, 8), other.view(4, 5, 8)[:2, :3])

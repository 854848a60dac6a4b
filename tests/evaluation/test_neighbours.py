from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from genscale.evaluation import neighbours
from genscale.evaluation.neighbours import nearest, squared_distances, squared_radii

random = np.random.default_rng(0)


def naive(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return ((points[:, None] - others[None]) ** 2).sum(-1)


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 26])
def test_blocks_make_up_the_matrix_of_squared_distances(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", block_bytes)
    points, others = random.normal(size=(23, 5)), random.normal(size=(17, 5))
    rows, blocks = zip(*squared_distances(points, others), strict=True)
    assert [number for part in rows for number in range(part.start, part.stop)] == list(range(23))
    np.testing.assert_allclose(np.concatenate(blocks), naive(points, others), rtol=1e-12)


def test_close_points_far_from_the_origin_are_told_apart() -> None:
    points = 1e6 + random.normal(size=(40, 3))
    found = np.concatenate([block for _, block in squared_distances(points, points)])
    np.testing.assert_allclose(found, naive(points, points), atol=1e-8)


def test_float32_features_are_compared_in_float64() -> None:
    points = (1e3 + random.normal(size=(40, 3))).astype(np.float32)
    found = np.concatenate([block for _, block in squared_distances(points, points)])
    np.testing.assert_allclose(found, naive(points.astype(np.float64), points.astype(np.float64)), atol=1e-9)


@pytest.mark.parametrize("neighbour", [1, 3, 22])
def test_radii_reach_to_the_kth_other_point(neighbour: int) -> None:
    points = random.normal(size=(23, 4))
    expected = np.sort(naive(points, points), axis=1)[:, neighbour]  # the first is the point itself
    np.testing.assert_allclose(squared_radii(points, neighbour), expected, rtol=1e-12)


def test_a_copy_is_a_neighbour_at_zero() -> None:
    points = np.repeat(random.normal(size=(5, 3)), 2, axis=0)
    np.testing.assert_allclose(squared_radii(points, 1), 0, atol=1e-14)


@pytest.mark.parametrize("part", [1, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nearest_does_not_depend_on_the_parts(part: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 400)
    points, others = random.normal(size=(31, 4)), random.normal(size=(29, 4))
    distances, numbers = nearest(points, (others[start : start + part] for start in range(0, 29, part)), count)
    squares = naive(points, others)
    np.testing.assert_array_equal(numbers, np.argsort(squares, axis=1)[:, :count])
    np.testing.assert_allclose(distances, np.sqrt(np.sort(squares, axis=1)[:, :count]), rtol=1e-12)


def test_copies_are_at_exactly_zero() -> None:
    others = (1e4 * random.normal(size=(50, 8))).astype(np.float32)
    distances, numbers = nearest(others[10:20], [others])
    assert distances.tolist() == [[0.0]] * 10
    assert numbers[:, 0].tolist() == list(range(10, 20))


def test_fewer_others_than_asked_for() -> None:
    distances, numbers = nearest(np.zeros((2, 1)), [np.ones((1, 1))], 3)
    assert numbers.tolist() == [[0, -1, -1]] * 2
    assert distances.tolist() == [[1, np.inf, np.inf]] * 2


def test_memory_does_not_grow_with_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 1 << 20)
    points = random.normal(size=(4000, 2))  # all distances would take 128 MB
    tracemalloc.start()
    squared_radii(points, 3)
    nearest(points, [points], 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6

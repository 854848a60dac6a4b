"""Rotary positions against rotation in the complex plane."""

import math

import pytest
import torch

from genscale.models.rotary import Rotary, rotate
from genscale.recipe.model import RotaryScaling


def test_pairs_turn_by_position_times_frequency():
    width, base = 8, 100.0
    x = torch.randn(2, 3, 5, width)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 100, 101]])
    rotated = rotate(x, Rotary(width, base)(positions, torch.float32))

    as_complex = torch.complex(x[..., : width // 2], x[..., width // 2 :]).to(torch.complex128)
    for pair in range(width // 2):
        angle = positions.double() * base ** (-2 * pair / width)
        turned = as_complex[..., pair] * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(rotated[..., pair].double(), turned.real, atol=3e-5, rtol=0)
        torch.testing.assert_close(rotated[..., pair + width // 2].double(), turned.imag, atol=3e-5, rtol=0)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    rotary = Rotary(16)

    def score(query_position, key_position):
        turned = [
            rotate(x, rotary(torch.tensor([p]), torch.float32)) for x, p in ((q, query_position), (k, key_position))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_stretching_follows_llama_3_1():
    scaling = RotaryScaling(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_context=8192)
    plain = Rotary(128, 500_000.0).frequencies().double()
    stretched = Rotary(128, 500_000.0, scaling).frequencies().double()
    for before, after in zip(plain.tolist(), stretched.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            expected = before
        elif wavelength > 8192 / 1:
            expected = before / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(expected, rel=1e-5)


def test_angles_stay_exact_when_the_model_is_cast():
    rotary = Rotary(16).to(torch.bfloat16)
    cosines, _ = rotary(torch.tensor([1000]), torch.float32)
    assert cosines[0, 0, 0, 1].item() == pytest.approx(math.cos(1000 * 10_000 ** (-2 / 16)), abs=1e-4)

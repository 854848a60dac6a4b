"""Twice and half the resolution: torch's bilinear interpolation, but differentiable twice and in a fixed order."""

import pytest
import torch
from torch.nn import functional as F

from genscale.models.resampling import downsample, upsample

SIZES = [(1, 1), (2, 2), (7, 7), (4, 6)]


@pytest.mark.parametrize("size", SIZES)
def test_upsampling_is_bilinear_interpolation(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(x), expected)


@pytest.mark.parametrize("size", SIZES)
def test_downsampling_is_bilinear_interpolation(size):
    x = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64)
    expected = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(downsample(x), expected)


@pytest.mark.parametrize("resample", [upsample, downsample])
def test_both_survive_a_second_derivative(resample):
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(resample, (x,))
    assert torch.autograd.gradgradcheck(lambda x: resample(x).pow(3), (x,))

"""Upsampling by a convolution, against what it is by definition."""

import pytest
import torch
from torch.nn import functional as F

from genscale.models.upsample import Upsample


@pytest.mark.parametrize("size", [1, 3, 6])
def test_upsampling_repeats_pixels_and_then_convolves(size):
    layer = Upsample(5).double()
    x = torch.randn(2, 5, size, size + 1, dtype=torch.float64, requires_grad=True)
    found = layer(x)
    expected = layer.convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream, wanted = torch.randn_like(expected), [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)

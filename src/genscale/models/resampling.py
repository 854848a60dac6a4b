"""Twice and half the resolution, by operations that are deterministic on every device and differentiable twice.

torch's own bilinear interpolation adds its gradients up in any order on a GPU, so that a run would not repeat.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample(x: Tensor) -> Tensor:
    """(batch, channels, height, width) to twice the height and width, bilinear; borders go on beyond the image."""
    return _upsample_last(_upsample_last(x).mT).mT


def _upsample_last(x: Tensor) -> Tensor:
    """(..., size) to (..., 2 size): each output lies a quarter of a pixel beside an input."""
    before = torch.cat((x[..., :1], x[..., :-1]), dim=-1)
    after = torch.cat((x[..., 1:], x[..., -1:]), dim=-1)
    return torch.stack((x.lerp(before, 0.25), x.lerp(after, 0.25)), dim=-1).flatten(-2)


def downsample(x: Tensor) -> Tensor:
    """(batch, channels, height, width) to half the height and width, both even: bilinear, the mean of 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)

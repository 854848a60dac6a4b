"""Rotary position embedding (Su et al. 2021), in the half-split form of Llama's published weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genscale.recipe.model import RotaryScaling

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (batch or 1, 1, tokens, head_width)."""


class Rotary(nn.Module):
    """From positions to rotations. It has neither parameters nor buffers: nothing to save, cast or move."""

    def __init__(self, head_width: int, base: float = 10_000.0, scaling: RotaryScaling | None = None):
        super().__init__()
        self.head_width, self.base, self.scaling = head_width, base, scaling

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """(head_width / 2,) float32: base^(-2i / head_width) radians per token, stretched as in Llama 3.1."""
        exponents = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32) / self.head_width
        frequencies = 1.0 / self.base**exponents
        if self.scaling is None:
            return frequencies
        scaling = self.scaling
        turns = scaling.original_context * frequencies / (2 * math.pi)  # full turns in the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, kept; 0: slow, stretched; a ramp between
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Rotations for ``positions``, (tokens,) or (batch, tokens), computed in float32 and given in ``dtype``."""
        angles = positions.float().unsqueeze(-1) * self.frequencies(positions.device)
        cosines, sines = angles.cos(), angles.sin()
        shape = (-1, 1, positions.shape[-1], self.head_width)  # a dimension for the heads
        return (
            torch.cat((cosines, cosines), -1).view(shape).to(dtype),
            torch.cat((-sines, sines), -1).view(shape).to(dtype),
        )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + head_width / 2) of x, (batch, heads, tokens, head_width), by its angle."""
    cosines, signed_sines = rotation
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), signed_sines)

"""Adaptive normalisation: what a network is told becomes scales, shifts and gates of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.models.layers import Norm


class Modulation(nn.Module):
    """From the condition, (batch, width) after its activation, to ``parts`` vectors, each (batch, 1, width).

    They begin at zero: scales change nothing, and gates are closed (adaLN-zero, Peebles and Xie 2023, section 3.2).
    """

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(condition).unsqueeze(1).chunk(self.parts, dim=-1)

    def initial_std(self, name: str, size: torch.Size) -> float:
        return 0.0


class AdaptiveNorm(nn.Module):
    """LayerNorm whose scale, as its difference from one, and shift are told: (batch, tokens, width) to the same."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        super().__init__()
        self.norm = Norm(width, "layer", epsilon, scale=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, self.norm(x), 1 + scale)

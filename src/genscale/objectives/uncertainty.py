"""A learned weight for each noise level: the network's own measure of how hard it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genscale.models.initialise import initialise
from genscale.runtime.randomness import generator

_FEATURES = 128


class Uncertainty(nn.Module):
    """The logarithm of the squared error that a network makes at a noise level, as far as is known: a linear function
    of Fourier features of the level, 0 at first (Karras et al. 2024, section 2.2)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        draws = generator("uncertainty")
        # Never trained, and the same in every network, so they need no place in a checkpoint.
        self.register_buffer("frequencies", torch.randn(_FEATURES, generator=draws), persistent=False)
        self.register_buffer("phases", torch.rand(_FEATURES, generator=draws), persistent=False)
        self.weight = nn.Parameter(torch.zeros(_FEATURES))

    def forward(self, noise_level: Tensor) -> Tensor:
        """(batch,) noise levels -> (batch,)."""
        angles = noise_level[:, None] * self.frequencies + self.phases  # (batch, features), in turns
        return (torch.cos(2 * math.pi * angles) * (self.weight * math.sqrt(2 / _FEATURES))).sum(dim=1)

    def initial_std(self, name: str, size: torch.Size) -> float:
        return 0.0


class UncertainDenoiser(nn.Module):
    """A denoising network and its uncertainty, trained together: (answer, uncertainty)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.uncertainty = Uncertainty()
        initialise(self.uncertainty, 0, prefix="uncertainty")

    def forward(self, x: Tensor, noise_level: Tensor, **conditions: Any) -> tuple[Tensor, Tensor]:
        return self.network(x, noise_level, **conditions), self.uncertainty(noise_level)

"""The recipe's ``training.low_communication``: groups of ranks that train apart and meet now and then."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genscale.recipe.base import Part


class LowCommunication(Part):
    """DiLoCo (Douillard et al. 2023, algorithm 1), in the streaming form (Douillard et al. 2025, algorithm 2)."""

    groups: int = Field(default=2, ge=1)
    """Groups of ranks that train apart, each on its own part of every batch. The number of processes is a multiple."""
    every: int = Field(default=50, ge=1)
    """Steps between two exchanges of the same weights (H)."""
    outer_learning_rate: float = Field(default=0.7, gt=0)
    """Of the Nesterov steps that the shared weights take along the groups' mean progress. 1 without momentum: the mean
    of the groups' weights."""
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    fragments: int = Field(default=1, ge=1)
    """Parts of the network that are exchanged at different steps: as many bytes, in smaller bursts."""
    overlap: int = Field(default=0, ge=0)
    """Steps that an exchange may take while training goes on."""
    mixing: float = Field(default=0.5, ge=0, lt=1)
    """With ``overlap``: how much of a group's own weights stays when the late shared ones arrive (alpha)."""
    bits: Literal[32, 16, 8, 4] = 32
    """Of each exchanged number: float32, bfloat16, or integers with a scale for each block of 256."""

    @model_validator(mode="after")
    def _within_a_period(self) -> LowCommunication:
        if self.overlap >= self.every:
            raise ValueError(f"overlap ({self.overlap}) must be less than every ({self.every})")
        if self.fragments > self.every:
            raise ValueError(f"fragments ({self.fragments}) must be at most every ({self.every})")
        return self

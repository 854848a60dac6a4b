"""A micro-batch of text as objectives see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """Windows of consecutive tokens.

    One window is context + 1 tokens long, so that each of its first ``context`` tokens has a next one.
    """

    tokens: Tensor
    """(batch, context + 1) int64."""
    documents: Tensor
    """(batch, context + 1) int32: the number of the document within the window, from 0, never falling."""
    valid: Tensor | None
    """(batch, context) bool: whether token t + 1 counts in the loss; None when all do."""
    positions: Tensor
    """(batch,) int64: each sample's position in the global batch; keys its randomness."""

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> TextBatch:
        return TextBatch(
            self.tokens.to(device, non_blocking=True),
            self.documents.to(device, non_blocking=True),
            None if self.valid is None else self.valid.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
        )

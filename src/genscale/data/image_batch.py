"""A micro-batch of images as objectives see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """Images, or latents, with what is known about each."""

    images: Tensor
    """(batch, channels, height, width) float32, from -1 to 1 (latents: as the autoencoder scales them)."""
    labels: Tensor | None
    """(batch,) int64, the number of the class, -1 where it is not known; None where the data has no classes."""
    captions: Tensor | None
    """(batch, caption_tokens) int64, filled up with 0; None where the data has no captions."""
    positions: Tensor
    """(batch,) int64: each sample's position in the global batch; keys its randomness."""

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str) -> ImageBatch:
        return ImageBatch(
            self.images.to(device, non_blocking=True),
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            None if self.captions is None else self.captions.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
        )

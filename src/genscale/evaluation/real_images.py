"""The real images of a run's store, by number, as evaluation looks at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.image_latents import decode_latents
from genscale.data.image_store import ImageStore
from genscale.generation.grid import from_pixels


class StoredImages:
    """One split of a store. Latents are decoded, because what a model draws is.

    Args:
        path: the store's folder.
        split: ``"train"`` or ``"validation"``.

    Raises:
        UserError: there is no such store, or a file of it is damaged.
    """

    def __init__(self, path: str | Path, split: str):
        store = ImageStore.open(path)
        self.described = store.described
        self.labels = store.labels(split)
        self._captions = store.captions(split)
        self._shards = [np.asarray(shard) for shard in store.shards(split)]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def images(self, numbers: NDArray[np.int64]) -> Tensor:
        """(numbers, channels, height, width) float32, from -1 to 1."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        places = numbers - np.concatenate([[0], self._ends])[shards]
        values = np.stack([self._shards[shard][place] for shard, place in zip(shards, places, strict=True)])
        if self.described.autoencoder is None:
            return from_pixels(values)
        latents = torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2)
        return decode_latents(self.described.autoencoder, latents).clamp(-1, 1).cpu()

    def captions(self, numbers: NDArray[np.int64]) -> Tensor | None:
        """(numbers, tokens) int64; None where the data has none."""
        return None if self._captions is None else torch.from_numpy(self._captions[numbers].astype(np.int64))

"""The stream of images: which make up each batch, as a pure function of (seed, step).

There is no state to save and no worker to feed. Sample number ``step * batch + position`` names its epoch and its place
in the epoch's shuffled order, and that an image, which is read straight from the memory-mapped shards, by any number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.image_batch import ImageBatch
from genscale.data.image_store import ImageStore
from genscale.data.permutation import evenly_spread, permute
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import key


class ImageStream:
    """The images of one split of a store.

    In training, each epoch goes through all of them once, in an order of its own.

    Args:
        store: of pixels or of latents.
        split: ``"train"`` or ``"validation"``.
        seed: the recipe's seed.

    Raises:
        UserError: the split is empty.
    """

    def __init__(self, store: ImageStore, split: str, seed: int):
        self.store = store
        self.split = split
        self.seed = seed
        self._images = store.images(split)
        if not self._images:
            raise UserError(f"the {split} split of {store.path} has no images: change data.split.validation")
        # Plain arrays over the same memory: indexing numpy's memmap class costs more.
        self._shards = [np.asarray(shard) for shard in store.shards(split)]
        self._first = np.cumsum([0] + [len(shard) for shard in self._shards])  # (shards + 1,) each one's first image
        self._labels, self._captions = store.labels(split), store.captions(split)

    @property
    def samples_per_epoch(self) -> int:
        """Images in the split."""
        return self._images

    def batch_at(self, step: int, batch: int, start: int = 0, stop: int | None = None) -> ImageBatch:
        """The samples at positions [start, stop) of the global batch of ``batch`` samples at ``step``.

        A pure function: however a global batch is cut into ranks and micro-batches, they hold the same samples.
        """
        stop = batch if stop is None else stop
        if not 0 <= start < stop <= batch:
            raise ValueError(f"positions {start} to {stop} are not in a batch of {batch}")
        epochs, places = np.divmod(np.arange(step * batch + start, step * batch + stop), self._images)
        epochs, which = np.unique(epochs, return_inverse=True)
        orders = np.array([key(self.seed, "order", 0, epoch) for epoch in epochs.tolist()], dtype=np.uint64)
        return self._batch(permute(places, self._images, orders[which]), np.arange(start, stop))

    def sweep(self, batch: int, limit: int | None = None) -> Iterator[ImageBatch]:
        """Every image of the split once, in order; ``positions`` are the images' numbers in the split.

        ``limit`` takes that many instead, one at a random place in each equal part of the split, and always the same
        ones whatever the seed, so that runs compare.
        """
        numbers = evenly_spread(self._images, limit)
        for chunk in np.split(numbers, range(batch, len(numbers), batch)):
            yield self._batch(chunk, chunk)

    def _batch(self, numbers: NDArray[np.int64], positions: NDArray[np.int64]) -> ImageBatch:
        return ImageBatch(
            images=self._read(numbers),
            labels=None if self._labels is None else torch.from_numpy(self._labels[numbers]),
            captions=None if self._captions is None else torch.from_numpy(self._captions[numbers].astype(np.int64)),
            positions=torch.from_numpy(np.array(positions)),
        )

    def _read(self, numbers: NDArray[np.int64]) -> Tensor:
        """(images, channels, height, width) float32: pixels from -1 to 1, latents as they are."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        offsets = numbers - self._first[shards]
        if len(self._shards) == 1:
            values = self._shards[0][offsets]
        else:
            values = np.empty((len(numbers), *self.store.shape), self.store.dtype)
            for shard in np.unique(shards).tolist():
                values[shards == shard] = self._shards[shard][offsets[shards == shard]]
        images = torch.from_numpy(values).permute(0, 3, 1, 2)
        if values.dtype != np.uint8:
            return images.to(torch.float32, memory_format=torch.contiguous_format)
        return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)

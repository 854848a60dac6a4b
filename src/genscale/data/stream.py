"""The stream: which windows of which stores make up each batch, as a pure function of (seed, step).

There is no state to save and no worker to feed. Sample number ``step * batch + position`` names the store it comes from
and its number among that store's samples; that names its epoch, its place in the epoch's shuffled order, and so its
window of tokens. Batches are read straight from the memory-mapped shards, by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.batch import TextBatch
from genscale.data.mixture import Mixture
from genscale.data.permutation import evenly_spread, permute
from genscale.data.store import Store
from genscale.data.windows import Places, WindowReader
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import key

_BLOCK = 4096  # consecutive samples that are placed together, because placing one costs nearly as much as a hundred


class Stream:
    """Windows of ``context + 1`` consecutive tokens from one or several stores.

    In training, each epoch cuts a store's tokens at another place and shuffles the windows anew. Neighbouring windows
    share one token, the last of one and the first of the next, so that each token is predicted once.

    Args:
        stores: all with the same tokenizer.
        weights: how often samples come from each store; by default in proportion to its windows.
        split: ``"train"`` or ``"validation"``.
        context: tokens that the network sees.
        seed: the recipe's seed.

    Raises:
        UserError: the tokenizers differ, a weight is impossible, the context is longer than a training split, or a
            validation split is empty.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float] | None, split: str, context: int, seed: int):
        self.stores = list(stores)
        self.split = split
        self.context = context
        self.seed = seed
        _check_tokenizers(self.stores)
        self._splits = [_Split(store.tokens(split), store.document_starts(split), context) for store in self.stores]
        if split == "train":
            for store, part in zip(self.stores, self._splits, strict=True):
                if part.in_epoch == 0:
                    length = f"the training split ({part.tokens} tokens) of {store.path}"
                    raise UserError(f"model.context ({context}) is longer than {length}")
            weights = [part.in_epoch for part in self._splits] if weights is None else weights
            self._mixture = Mixture(weights, [str(store.path) for store in self.stores])
        elif not any(part.in_sweep for part in self._splits):
            paths = ", ".join(str(store.path) for store in self.stores)
            raise UserError(
                f"the {split} split of {paths} has fewer than 2 tokens, too short to score:"
                " raise data.split.validation or add documents"
            )
        shards = [shard for store in self.stores for shard in store.shards(split)]
        self._reader = WindowReader(shards, context + 1)
        # (stores,) the first token of each, counted over all stores
        self._first = np.cumsum([0] + [part.tokens for part in self._splits[:-1]])
        self._last: tuple[int, _Windows] | None = None  # the block of samples that was placed last

    @property
    def samples_per_epoch(self) -> int:
        """Windows in all stores together; a mixture goes through a store more or less often, as its weight says."""
        return sum(part.in_epoch for part in self._splits)

    def batch_at(self, step: int, batch: int, start: int = 0, stop: int | None = None) -> TextBatch:
        """The samples at positions [start, stop) of the global batch of ``batch`` samples at ``step``; training only.

        A pure function: however a global batch is cut into ranks and micro-batches, they hold the same samples.
        """
        stop = batch if stop is None else stop
        if not 0 <= start < stop <= batch:
            raise ValueError(f"positions {start} to {stop} are not in a batch of {batch}")
        tokens, documents = self._read(self._samples(step * batch + start, step * batch + stop))
        return TextBatch(tokens, documents, None, torch.from_numpy(np.arange(start, stop)))

    def sweep(self, batch: int, limit: int | None = None) -> Iterator[TextBatch]:
        """Every window of the split once, in order, so that each token but a store's first is scored once.

        ``limit`` takes that many windows instead, one at a random place in each equal part of the split, and always the
        same ones whatever the seed, so that runs compare. ``positions`` are the windows' numbers in the split. The last
        window of a store may be partial: it is padded, the padding is a document of its own, and ``valid`` masks it.
        """
        counts = np.array([part.in_sweep for part in self._splits])
        numbers = evenly_spread(int(counts.sum()), limit)
        first = np.cumsum(counts) - counts  # (stores,) number of each one's first window
        for chunk in np.split(numbers, range(batch, len(numbers), batch)):
            stores = np.searchsorted(first, chunk, side="right") - 1
            starts = (chunk - first[stores]) * self.context
            left = np.array([part.tokens for part in self._splits])[stores] - starts  # (chunk,) tokens in the store
            tokens, documents = self._read(self._windows(stores, starts))
            if (left > self.context).all():
                valid = None
            else:
                inside = torch.from_numpy(np.arange(self.context + 1) < left[:, None])
                end = self.stores[0].tokenizer.end_of_document
                tokens = torch.where(inside, tokens, 0 if end is None else end)
                valid = inside[:, 1:]
            yield TextBatch(tokens, documents, valid, torch.from_numpy(chunk))

    def _samples(self, start: int, stop: int) -> _Windows:
        """The windows of the samples numbered [start, stop)."""
        pieces = []
        while start < stop:
            block, skip = divmod(start, _BLOCK)
            if self._last is None or self._last[0] != block:
                self._last = block, self._block(block)
            end = min(stop, start - skip + _BLOCK)
            pieces.append(self._last[1].cut(skip, skip + end - start))
            start = end
        return pieces[0] if len(pieces) == 1 else _Windows.join(pieces)

    def _block(self, block: int) -> _Windows:
        """The windows of one block of samples."""
        stores, numbers = self._mixture.locate(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        starts = np.empty(_BLOCK, dtype=np.int64)
        for store in np.unique(stores).tolist():
            part = self._splits[store]
            epochs, places = np.divmod(numbers[stores == store], part.in_epoch)
            epochs, which = np.unique(epochs, return_inverse=True)
            orders = np.array([key(self.seed, "order", store, epoch) for epoch in epochs.tolist()], dtype=np.uint64)
            cuts = np.array([key(self.seed, "cut", store, epoch) for epoch in epochs.tolist()]) % part.cuts
            starts[stores == store] = cuts[which] + permute(places, part.in_epoch, orders[which]) * self.context
        return self._windows(stores, starts)

    def _windows(self, stores: NDArray[np.int64], starts: NDArray[np.int64]) -> _Windows:
        """The windows that start at these tokens of these stores, with their documents."""
        width = self.context + 1
        rows = np.arange(len(starts) + 1) * width
        edges = [rows]
        for store, part in enumerate(self._splits):
            mine = np.flatnonzero(stores == store)
            which, offsets = part.boundaries(starts[mine])
            edges.append(rows[mine[which]] + offsets)
        edge = np.sort(np.concatenate(edges))  # (runs + 1,) ends of runs of one document, over the flattened windows
        first = np.searchsorted(edge, rows)
        documents = np.arange(len(edge) - 1) - np.repeat(first[:-1], np.diff(first))
        places = self._reader.locate(self._first[stores] + starts)
        return _Windows(places, first, np.diff(edge), documents.astype(np.int32))

    def _read(self, windows: _Windows) -> tuple[Tensor, Tensor]:
        """(windows, context + 1) int64 tokens and int32 documents."""
        tokens = self._reader.read(windows.places)
        documents = windows.documents.repeat(windows.lengths).reshape(tokens.shape)
        return torch.from_numpy(tokens), torch.from_numpy(documents)


def _check_tokenizers(stores: list[Store]) -> None:
    for store in stores[1:]:
        if store.tokenizer.fingerprint != stores[0].tokenizer.fingerprint:
            first = stores[0].path
            raise UserError(
                f"{store.path} and {first} have different tokenizers and a mixture needs one: prepare {store.path}"
                f" with data.tokenizer={{kind: file, path: {first}/tokenizer.json}}"
            )


class _Windows(NamedTuple):
    """Where windows are, and the runs of tokens of one document that they are made of."""

    places: Places
    first: NDArray[np.int64]  # (windows + 1,) number of each window's first run
    lengths: NDArray[np.int64]  # (runs,) in tokens
    documents: NDArray[np.int32]  # (runs,) number of the document within the window

    def cut(self, start: int, stop: int) -> _Windows:
        """The windows [start, stop) of these."""
        places = Places(self.places.arrays[start:stop], self.places.offsets[start:stop])
        first = self.first[start : stop + 1]
        low, high = first[0], first[-1]
        return _Windows(places, first, self.lengths[low:high], self.documents[low:high])

    @classmethod
    def join(cls, pieces: list[_Windows]) -> _Windows:
        """The windows of all pieces, one after the other."""
        arrays, offsets = (np.concatenate(parts) for parts in zip(*(piece.places for piece in pieces), strict=True))
        runs = np.concatenate([[0]] + [np.diff(piece.first) for piece in pieces])
        lengths = np.concatenate([piece.lengths for piece in pieces])
        documents = np.concatenate([piece.documents for piece in pieces])
        return cls(Places(arrays, offsets), np.cumsum(runs), lengths, documents)


class _Split:
    """The arithmetic of one split of one store: how many windows, and which documents begin inside them."""

    def __init__(self, tokens: int, documents: np.ndarray, context: int):
        self.tokens = tokens
        self.context = context
        self._documents = np.asarray(documents)
        # Whole windows in an epoch, the same number wherever it cuts the text; 0 where not even one fits.
        self.in_epoch = max(1, (tokens - context) // context) if tokens > context else 0
        # Tokens at which an epoch's first window may start, so that over the epochs each token is learned from.
        self.cuts = tokens - self.in_epoch * context
        # Windows from the first token on, the last perhaps partial.
        self.in_sweep = -(-(tokens - 1) // context) if tokens > 1 else 0

    def boundaries(self, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents that begin inside windows, after the first token; padding counts as one.

        Returns:
            (boundaries,) the window, as an index of ``starts``.
            (boundaries,) how many tokens into it the document begins, from 1 to ``context``.
        """
        order = np.argsort(starts)  # searching in order is several times as fast
        ascending = starts[order]
        low = np.searchsorted(self._documents, ascending, side="right")
        counts = np.searchsorted(self._documents, ascending + self.context, side="right") - low
        numbers = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        which = np.repeat(order, counts)
        padded = np.flatnonzero(starts + self.context >= self.tokens)
        return (
            np.concatenate([which, padded]),
            np.concatenate([self._documents[numbers] - starts[which], self.tokens - starts[padded]]),
        )

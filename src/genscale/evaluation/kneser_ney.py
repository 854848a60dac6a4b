"""Interpolated modified Kneser-Ney n-grams over tokens: the baseline that a language model has to beat.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3 and equations
(16) to (19), with discounts from counts of counts. Tokens are one sequence: n-grams run across the ends of documents,
as the windows that a network is trained on do, and the end-of-document token is a token like any other.

Counting is sorting. An n-gram that occurs in the training tokens has a number; its key, the number of its first n - 1
tokens times the vocabulary plus its last token, fits 64 bits at any order. Order 5 takes five sorts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genscale.data.store import Store

_FALLBACK = 0.5, 1.0, 1.5


class Counts(NamedTuple):
    """The n-grams of one order that occur in the training tokens."""

    keys: NDArray[np.int64]
    """(types,) ascending: the number of the (n - 1)-gram before the last token * vocabulary + the last token."""
    occurrences: NDArray[np.int64]
    """(types,) how often each occurs."""
    continuations: NDArray[np.int64]
    """(types,) how many different tokens it occurs after; empty for the highest order, which has no use for it."""


def count(tokens: NDArray[np.int64], order: int, vocabulary: int) -> list[Counts]:
    """Counts of the n-grams of orders 1 to ``order``; those of a higher order hold all that lower orders need."""
    levels: list[Counts] = []
    numbers = np.zeros(len(tokens) + 1, dtype=np.int32)  # of the n-gram that ends before each token: one 0-gram
    for _ in range(order):
        # The n-gram that ends at token i is the (n - 1)-gram that ends at i - 1, and token i.
        grams = numbers[:-1].astype(np.int64)
        grams *= vocabulary
        grams += tokens[len(tokens) - len(grams) :]
        keys, first, number, occurrences = _unique(grams)
        if levels:
            # Each n-gram adds one continuation to the (n - 1)-gram at its end; any occurrence of it tells which.
            suffixes = numbers[1:][first]
            levels[-1] = levels[-1]._replace(continuations=np.bincount(suffixes, minlength=len(levels[-1].keys)))
        levels.append(Counts(keys, occurrences, np.empty(0, dtype=np.int64)))
        numbers = number
    return levels


def _unique(
    values: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """``np.unique`` with index, inverse and counts; several times as fast, with a third of its memory."""
    ascending, order = _sort(values)
    starts = np.ones(len(values), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=starts[1:])
    inverse = np.empty(len(values), dtype=np.int32)
    inverse[order] = np.cumsum(starts, dtype=np.int32) - np.int32(1)
    edges = np.flatnonzero(starts)
    return ascending[edges], order[edges], inverse, np.diff(edges, append=len(values))


def _sort(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values in ascending order, and where each came from."""
    bits = len(values).bit_length()
    if int(values.max(initial=0)).bit_length() + bits <= 63:
        # Value and place in one number: sorting numbers is faster than sorting places by their values.
        packed = values << bits
        packed |= np.arange(len(values))
        packed.sort()
        return packed >> bits, packed & ((1 << bits) - 1)
    order = np.argsort(values, kind="stable")
    return values[order], order


class _Order(NamedTuple):
    """One order's part of the recursion p(w | h) = discounted(h, w) + backoff(h) p(w | h without its first token)."""

    keys: NDArray[np.int64]  # (types,) ascending
    discounted: NDArray[np.float64]  # (types,) discounted count / total of the context
    backoff: NDArray[np.float64]  # (contexts,) the weight of the lower order; 1 where nothing followed the context


class KneserNey:
    """An n-gram model.

    Args:
        order: n, at least 1.
        vocabulary: number of tokens; those never seen share what is left of the unigrams evenly.
    """

    def __init__(self, order: int, vocabulary: int):
        self.order = order
        self.vocabulary = vocabulary
        self._orders: list[_Order] = []

    def fit(self, tokens: NDArray[np.integer] | Sequence[NDArray[np.integer]]) -> KneserNey:
        """Fit to a sequence of tokens, or to shards that are one sequence in order."""
        return self.fit_counts(count(_join(tokens), self.order, self.vocabulary))

    def fit_counts(self, levels: list[Counts]) -> KneserNey:
        """Fit to the counts of these tokens, of this order or a higher one."""
        self._orders = []
        contexts = 1
        for level in levels[: self.order]:
            highest = len(self._orders) == self.order - 1
            counts = level.occurrences if highest else level.continuations
            self._orders.append(_fit_order(level.keys, counts, contexts, self.vocabulary))
            contexts = len(level.keys)
        return self

    def log_probabilities(self, tokens: NDArray[np.integer] | Sequence[NDArray[np.integer]]) -> NDArray[np.float64]:
        """(tokens - 1,) natural log of the probability of each token but the first, given those before it."""
        sequence = _join(tokens)
        probability = np.full(len(sequence), 1.0 / self.vocabulary)
        numbers = np.zeros(len(sequence) + 1, dtype=np.int64)  # of the context of each token, -1 if it never occurred
        for length, level in enumerate(self._orders):
            # The first ``length`` tokens have no context of this length and keep the lower order's probability.
            here = probability[length:]
            contexts = numbers[: len(here)]
            known = contexts >= 0
            grams = np.where(known, contexts * self.vocabulary + sequence[length:], -1)
            numbers = _find(level.keys, grams)
            here[known] *= level.backoff[contexts[known]]
            here[numbers >= 0] += level.discounted[numbers[numbers >= 0]]
        return np.log(probability[1:])

    def loss(self, tokens: NDArray[np.integer] | Sequence[NDArray[np.integer]]) -> float:
        """Mean nats per token over every token but the first."""
        return float(-self.log_probabilities(tokens).mean())


def fit_baselines(
    stores: Store | Sequence[Store], orders: Sequence[int] = (3, 5), most_tokens: int | None = None
) -> dict[int, float]:
    """Mean nats per token on the validation split of models fitted to the training split, for each order.

    The tokens scored are those that ``Stream.sweep`` scores: each of the split but a store's first.

    Args:
        stores: one or several with the same tokenizer; several are fitted together, each token weighing the same.
        orders: of the models; they share one count.
        most_tokens: fit to at most this many training tokens, the first ones; by default to all. Fitting takes about
            100 bytes of memory a token.
    """
    stores = list(stores) if isinstance(stores, Sequence) else [stores]
    vocabulary = stores[0].tokenizer.size
    training = _join([shard for store in stores for shard in store.shards("train")], most_tokens)
    levels = count(training, max(orders), vocabulary)
    del training
    losses = {}
    for order in orders:
        model = KneserNey(order, vocabulary).fit_counts(levels)
        scores = [model.log_probabilities(store.shards("validation")) for store in stores]
        losses[order] = float(-np.concatenate(scores).mean())
    return losses


def _fit_order(keys: NDArray[np.int64], counts: NDArray[np.int64], contexts: int, vocabulary: int) -> _Order:
    discounts = np.array([0.0, *_discounts(counts)])
    size = np.minimum(counts, 3)
    context = keys // vocabulary
    total = np.bincount(context, weights=counts, minlength=contexts)
    taken = np.bincount(context, weights=discounts[size], minlength=contexts)
    occurs = total > 0
    backoff = np.divide(taken, total, out=np.ones(contexts), where=occurs)
    share = np.divide(counts - discounts[size], total[context], out=np.zeros(len(keys)), where=occurs[context])
    return _Order(keys, share, backoff)


def _discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """What is taken from counts of 1, of 2, and of 3 or more: equation (17) of Chen and Goodman.

    Where too few n-grams have small counts (a small alphabet on a large text), the estimates do not exist or are out of
    range; then they are 0.5, 1 and 1.5, as in KenLM (Heafield et al. 2013, ``--discount_fallback``).
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if not (n1 and n2 and n3):
        return _FALLBACK
    y = n1 / (n1 + 2 * n2)
    discounts = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return discounts if all(0 <= discount <= size for size, discount in enumerate(discounts, 1)) else _FALLBACK


def _find(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each wanted key among the ascending keys, -1 where it is not."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(wanted)  # so that the search walks through memory once
    places = np.empty(len(wanted), dtype=np.int64)
    places[order] = np.minimum(np.searchsorted(keys, wanted[order]), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


def _join(tokens: NDArray[np.integer] | Sequence[NDArray[np.integer]], most: int | None = None) -> NDArray[np.int64]:
    """One array of a sequence of tokens or of its shards, or of the first ``most`` tokens."""
    shards = [tokens] if isinstance(tokens, np.ndarray) else tokens
    pieces = []
    left = sum(map(len, shards)) if most is None else most
    for shard in shards:
        pieces.append(shard[:left].astype(np.int64))
        left -= len(pieces[-1])
    return np.concatenate(pieces)

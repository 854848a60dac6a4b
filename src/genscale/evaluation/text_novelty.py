"""How much of a generated text is new, and how much is copied from the training text.

The novelty of n-grams (McCoy et al. 2023; Merrill et al. 2024) is the share of a text's n-grams that occur nowhere in
the training tokens; a verbatim copy is a run of many tokens that does occur. Both follow from one thing: the longest
run from each token on that occurs in training.

It is found exactly, without hashing and without an index of the training tokens, which may be many times larger than
memory. The n-grams of the generated texts, which are few, get numbers. The training tokens pass by in pieces; at each
place the n-gram there has its number, or none, and only places that have one are looked at for n + 1. As n grows these
become few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 1 << 21
"""Training tokens that are looked at together; takes about 100 MB."""


class Match(NamedTuple):
    """The longest run of a generated text that occurs in the training tokens."""

    text: int
    """Number of the text."""
    start: int
    """Its first token in the text."""
    tokens: int
    place: int
    """Where it occurs: the first token, counted over all training tokens; -1 where the run has no tokens."""


class Novelty(NamedTuple):
    """What is new and what is copied."""

    novel: NDArray[np.float64]
    """(orders,) the share of n-grams that are not in the training tokens, for n = 1, 2, ...; nan where no text has n
    tokens."""
    verbatim: float
    """The share of tokens within a run of at least ``run`` tokens that occurs in training."""
    mean_match: float
    """The mean over tokens of the longest run from it on that occurs in training, in tokens."""
    longest: Match


def novelty(
    texts: Sequence[NDArray[np.integer]],
    training: Sequence[NDArray[np.integer]],
    *,
    orders: int = 16,
    run: int = 50,
    longest: int = 256,
    piece: int = PIECE,
) -> Novelty:
    """Compare generated texts with training tokens.

    Args:
        texts: token ids of each generated text, without its prompt; at least one token in all.
        training: shards of token ids, memory-mapped or not, each on its own: no run goes on from one to the next.
        orders: n-grams up to this n make the curve.
        run: tokens that make a verbatim copy (50 in Carlini et al. 2023).
        longest: runs are followed up to this many tokens; takes about 12 x longest bytes for each generated token.
        piece: training tokens that are looked at together.
    """
    if longest < max(orders, run):
        raise ValueError(f"longest ({longest}) must be at least orders ({orders}) and run ({run})")
    sizes = np.array([len(text) for text in texts])
    matches, places = longest_matches(texts, training, longest, piece)
    left = np.concatenate([np.arange(size, 0, -1) for size in sizes])  # tokens from each to its text's end
    curve = np.full(orders, np.nan)
    for n in range(1, orders + 1):
        whole = left >= n
        if whole.any():
            curve[n - 1] = (matches[whole] < n).mean()
    best = int(matches.argmax())
    text = int(np.searchsorted(np.cumsum(sizes), best, side="right"))
    return Novelty(
        novel=curve,
        verbatim=_covered(matches, run),
        mean_match=float(matches.mean()),
        longest=Match(text, best - int(sizes[:text].sum()), int(matches[best]), int(places[best])),
    )


def longest_matches(
    texts: Sequence[NDArray[np.integer]],
    training: Sequence[NDArray[np.integer]],
    longest: int,
    piece: int = PIECE,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token of all texts, one after the other, the longest run from it on that occurs in the training tokens.

    Returns:
        (tokens,) its length, at most ``longest`` and at most to the text's end.
        (tokens,) where it occurs, counted over all training tokens; -1 where there is no run.
    """
    grams = _number(texts, longest)
    matches = np.zeros(len(grams.numbers[0]), dtype=np.int64)
    places = np.full(len(matches), -1)
    for first, tokens, starts in _pieces(training, longest, piece):
        for n, (seen, where) in enumerate(_seen(grams, tokens, starts), start=1):
            # A run that was as long in an earlier piece keeps its place there.
            held = grams.numbers[n - 1] >= 0
            new = held & (matches < n)
            new[new] = seen[grams.numbers[n - 1][new]]
            matches[new] = n
            places[new] = first + where[grams.numbers[n - 1][new]]
    return matches, places


class _Grams(NamedTuple):
    """The n-grams of the generated texts, for n = 1, 2, ..."""

    numbers: list[NDArray[np.int32]]
    """For each n: (tokens,) the number of the n-gram that starts at each token, -1 where its text is too short."""
    keys: list[NDArray[np.int64]]
    """For each n: (types,) ascending: the number of the first n - 1 tokens x vocabulary + the last token."""
    vocabulary: int
    """Above every token of the texts."""


def _number(texts: Sequence[NDArray[np.integer]], longest: int) -> _Grams:
    tokens = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    ends = np.repeat(np.cumsum([len(text) for text in texts]), [len(text) for text in texts])
    vocabulary = int(tokens.max()) + 1
    numbers, keys = [], []
    current = np.zeros(len(tokens), dtype=np.int64)  # the one 0-gram
    for n in range(1, min(longest, max(len(text) for text in texts)) + 1):
        whole = np.flatnonzero(np.arange(len(tokens)) + n <= ends)
        found, inverse = np.unique(current[whole] * vocabulary + tokens[whole + n - 1], return_inverse=True)
        current = np.full(len(tokens), -1)
        current[whole] = inverse
        numbers.append(current.astype(np.int32))
        keys.append(found)
    return _Grams(numbers, keys, vocabulary)


def _pieces(
    training: Sequence[NDArray[np.integer]], longest: int, piece: int
) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """Pieces of the shards: the number of the first token, the tokens, and how many of them runs may start at; the rest
    is what such runs reach into."""
    first = 0
    for shard in training:
        for start in range(0, len(shard), piece):
            tokens = shard[start : start + piece + longest - 1].astype(np.int64)
            yield first + start, tokens, min(piece, len(shard) - start)
        first += len(shard)


def _seen(
    grams: _Grams, tokens: NDArray[np.int64], starts: int
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """For each n, while there are any: which n-grams of the texts occur among the tokens, and a place of each."""
    at = np.arange(starts)  # places whose n-gram has a number
    numbers = np.zeros(starts, dtype=np.int64)
    for n, keys in enumerate(grams.keys, start=1):
        inside = at + n <= len(tokens)
        at, numbers = at[inside], numbers[inside]
        last = tokens[at + n - 1]
        known = last < grams.vocabulary
        at, wanted = at[known], numbers[known] * grams.vocabulary + last[known]
        numbers = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = keys[numbers] == wanted
        at, numbers = at[hit], numbers[hit]
        if not len(at):
            return
        seen, where = np.zeros(len(keys), dtype=bool), np.full(len(keys), -1)
        seen[numbers] = True
        where[numbers] = at
        yield seen, where


def _covered(matches: NDArray[np.int64], run: int) -> float:
    """The share of tokens within a match of at least ``run`` tokens."""
    long = np.flatnonzero(matches >= run)
    edges = np.zeros(len(matches) + 1, dtype=np.int64)
    np.add.at(edges, long, 1)
    np.add.at(edges, long + matches[long], -1)
    return float((np.cumsum(edges[:-1]) > 0).mean())

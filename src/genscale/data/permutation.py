"""A shuffle without an index array: any element of a random order of [0, size) in constant time and memory.

A Feistel network over pairs (left, right) in Z_a x Z_b with a * b just above the size: each round adds a keyed hash of
one half to the other half, modulo that half's range, which can be undone whatever the hash is, so that the whole is a
bijection. Numbers at or above the size are sent through again until they fall below it (cycle walking; Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", sections 3 and 5). With a and b both near the square root of the
size, that is one number in sqrt(size), where a network over whole bits would walk up to four times.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from genscale.runtime import randomness

_ROUNDS = 10
_SMALL = 256  # below this size few rounds favour some orders over others (measured over all orders of 5 and of 6)
_SMALL_ROUNDS = 24
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def permute(indices: NDArray[np.int64], size: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index stands in the order of [0, size) that ``key`` picks.

    Args:
        indices: any shape, each in [0, size).
        size: at least 1, below 2^62.
        key: below 2^64; one for all, or one for each index (an array of the same shape).

    Returns:
        int64 of the same shape, each in [0, size). For one key, different indices give different numbers.
    """
    shape = np.shape(indices)
    values = np.array(indices, dtype=np.uint64).reshape(-1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), shape).reshape(-1)
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    rounds = _SMALL_ROUNDS if size < _SMALL else _ROUNDS
    values = _feistel(values, width, height, keys, rounds)
    walking = np.flatnonzero(values >= np.uint64(size))
    while walking.size:
        values[walking] = _feistel(values[walking], width, height, keys[walking], rounds)
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64).reshape(shape)


def _feistel(
    values: NDArray[np.uint64], width: int, height: int, keys: NDArray[np.uint64], rounds: int
) -> NDArray[np.uint64]:
    """A bijection of [0, width * height), chosen by the key."""
    left, right = np.divmod(values, np.uint64(height))  # left in [0, width), right in [0, height)
    for number in range(0, rounds, 2):
        _add_hash(left, right, keys, number, np.uint64(width))
        _add_hash(right, left, keys, number + 1, np.uint64(height))
    return left * np.uint64(height) + right


def _add_hash(
    half: NDArray[np.uint64], other: NDArray[np.uint64], keys: NDArray[np.uint64], number: int, limit: np.uint64
) -> None:
    """To one half, in [0, limit), add a hash of the other half, the key and the round, modulo the limit; in place."""
    bits = other + np.uint64((number + 1) * _GAMMA & _MASK)
    bits += keys
    # Two of the multiplications of SplitMix64 (Steele, Lea and Flood 2014, figure 17): only upper bits are used.
    bits *= _MULTIPLIER_1
    bits ^= bits >> np.uint64(32)
    bits *= _MULTIPLIER_2
    bits >>= np.uint64(32)
    bits *= limit
    bits >>= np.uint64(32)  # in [0, limit)
    half += bits
    np.subtract(half, limit, out=bits)
    np.minimum(half, bits, out=half)  # below the limit the difference wraps around to a huge number


def evenly_spread(total: int, limit: int | None) -> NDArray[np.int64]:
    """All numbers below ``total`` in order, or ``limit`` of them: a random one of each equal part, always the same."""
    if limit is None or limit >= total:
        return np.arange(total)
    edges = np.arange(limit + 1) * total // limit
    return edges[:-1] + np.array([randomness.key("sweep", part) for part in range(limit)]) % np.diff(edges)

"""Which store each sample of a mixture comes from: a pure function of the sample's number.

The order repeats with a period, found once: within it, at each sample, of the stores that have fallen behind their
share the one that must come first does (Tijdeman 1980, "The chairman assignment problem"). Then in any number of
samples from the start each store's count is less than one away from its share, for any number of stores; rounding each
store's share by itself or dealing by random draws does not give that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from genscale.runtime.errors import UserError

LONGEST_PERIOD = 1 << 16


class Mixture:
    """Deals samples out to stores by weight.

    Args:
        weights: one for each store, above 0; they need not sum to 1. Shares whose common denominator is above
            65,536 are rounded to multiples of 1 / 65,536.
        names: the stores' names, for messages.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str]):
        for weight, name in zip(weights, names, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the mixture's weight of {name} is {weight:g}, expected a number above 0")
        shares = [Fraction(weight) for weight in weights]
        self.counts = _counts([share / sum(shares) for share in shares])
        """(stores,) samples of each store in one period."""
        for count, weight, name in zip(self.counts, weights, names, strict=True):
            if count == 0:
                raise UserError(
                    f"the mixture's weight of {name} is {weight:g}, too small beside the others:"
                    f" expected at least 1 / {LONGEST_PERIOD} of their sum"
                )
        self.period = int(self.counts.sum())
        self._store = _deal(self.counts)  # (period,)
        self._number = np.zeros(self.period, dtype=np.int64)  # (period,) among the samples of the same store
        for store, count in enumerate(self.counts):
            self._number[self._store == store] = np.arange(count)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The store of each sample, and its number among that store's samples, counted from 0."""
        rounds, places = np.divmod(samples, self.period)
        stores = self._store[places]
        return stores, rounds * self.counts[stores] + self._number[places]


def _counts(shares: list[Fraction]) -> NDArray[np.int64]:
    """Whole numbers in the proportion of the shares (which sum to 1), their sum at most the longest period."""
    simple = [share.limit_denominator(LONGEST_PERIOD) for share in shares]
    period = math.lcm(*(share.denominator for share in simple))
    if sum(simple) == 1 and period <= LONGEST_PERIOD:
        return np.array([int(share * period) for share in simple], dtype=np.int64)
    scaled = [share * LONGEST_PERIOD for share in shares]
    counts = np.array([math.floor(share) for share in scaled], dtype=np.int64)
    remainders = np.array([float(share - math.floor(share)) for share in scaled])
    counts[np.argsort(-remainders, kind="stable")[: LONGEST_PERIOD - counts.sum()]] += 1
    return counts


def _deal(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(period,) the store of each sample of a period."""
    period, stores = int(counts.sum()), len(counts)
    if stores == 1:
        return np.zeros(period, dtype=np.int64)
    slack = 2 * stores - 2
    behind = np.zeros(stores, dtype=np.int64)  # share minus samples so far, in units of 1 / period
    order = np.empty(period, dtype=np.int64)
    for place in range(period):
        behind += counts
        # A store may come once it is 1 / slack of a sample behind; the first to be 1 - 1 / slack behind must come.
        deadline = np.where(slack * behind >= period, ((slack - 1) * period - slack * behind) / counts, np.inf)
        store = int(deadline.argmin())
        order[place] = store
        behind[store] -= period
    return order

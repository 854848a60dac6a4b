from __future__ import annotations

import numpy as np
import pytest

from genscale.data.mixture import LONGEST_PERIOD, Mixture
from genscale.runtime.errors import UserError

WEIGHTS = [
    [1.0],
    [1, 1],
    [0.5, 0.3, 0.2],
    [0.7, 0.2, 0.1],
    [3, 1],
    [1 / 3, 2 / 3],
    [97, 1, 1, 1],
    [0.97, 0.01, 0.01, 0.01],
    [1, 2, 3, 5, 8, 13, 21],
    [1] * 12,
    [1000, 1, 1, 1, 1, 1, 1, 1],
]


def names(weights: list[float]) -> list[str]:
    return [f"stores/{number}" for number in range(len(weights))]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_is_within_one_sample_of_each_weight(weights: list[float]) -> None:
    mixture = Mixture(weights, names(weights))
    samples = np.arange(max(3 * mixture.period, 2000))
    stores, numbers = mixture.locate(samples)
    shares = np.array(weights) / sum(weights)
    for store, share in enumerate(shares):
        counts = np.cumsum(stores == store)
        assert np.abs(counts - (samples + 1) * share).max() < 1
        # Its samples are numbered one after the other.
        np.testing.assert_array_equal(numbers[stores == store], np.arange(counts[-1]))


def test_unrelated_weights_are_rounded_to_the_longest_period() -> None:
    weights = [12_345_677, 8_765_431, 1_000_003, 333]
    mixture = Mixture(weights, names(weights))
    assert mixture.period == LONGEST_PERIOD
    shares = np.array(weights) / sum(weights)
    np.testing.assert_allclose(mixture.counts / mixture.period, shares, atol=1 / LONGEST_PERIOD)
    stores, _ = mixture.locate(np.arange(mixture.period))
    for store, count in enumerate(mixture.counts):
        counts = np.cumsum(stores == store)
        assert np.abs(counts - np.arange(1, mixture.period + 1) * count / mixture.period).max() < 1


def test_far_samples_continue_the_pattern() -> None:
    mixture = Mixture([0.5, 0.3, 0.2], names([1, 1, 1]))
    far = 10**12 + np.arange(1000)
    stores, numbers = mixture.locate(far)
    np.testing.assert_array_equal(stores, mixture.locate(far % 10)[0])
    np.testing.assert_array_equal(numbers[stores == 1], 3 * 10**11 + np.arange(300))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_an_impossible_weight_is_named(weight: float) -> None:
    with pytest.raises(UserError, match=f"the mixture's weight of stores/1 is {weight:g}, expected a number above 0"):
        Mixture([1, weight], names([1, 1]))


def test_a_weight_that_would_never_be_dealt_is_refused() -> None:
    with pytest.raises(UserError, match="weight of stores/1 is 1e-07, too small beside the others"):
        Mixture([1, 1e-7], names([1, 1]))

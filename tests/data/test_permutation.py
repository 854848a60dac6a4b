from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chisquare

from genscale.data.permutation import permute
from genscale.runtime.randomness import key

SIZES = [*range(1, 20), 63, 64, 65, 97, 255, 256, 257, 1000, 1023, 1024, 1025, 4096, 9973, 65536, 99991]


@pytest.mark.parametrize("size", SIZES)
def test_every_number_comes_once(size: int) -> None:
    for number in range(3):
        order = permute(np.arange(size), size, key("bijection", number))
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_large_sizes_stay_in_range_and_do_not_collide() -> None:
    indices = np.concatenate([np.arange(50_000), 10**15 - 1 - np.arange(50_000)])
    values = permute(indices, 10**15, 7)
    assert values.min() >= 0
    assert values.max() < 10**15
    assert len(np.unique(values)) == len(values)


def test_an_element_does_not_depend_on_its_neighbours_in_the_call() -> None:
    whole = permute(np.arange(1000), 1000, 5)
    picked = np.array([[999, 0], [17, 500]])
    np.testing.assert_array_equal(permute(picked, 1000, 5), whole[picked])
    assert permute(np.array([17]), 1000, 5) == whole[17]


def test_one_key_for_each_index() -> None:
    keys = np.array([key(number) for number in range(4)], dtype=np.uint64)
    together = permute(np.arange(40).reshape(4, 10) % 10, 10, np.repeat(keys, 10).reshape(4, 10))
    for row, one in enumerate(keys):
        np.testing.assert_array_equal(together[row], permute(np.arange(10), 10, int(one)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_small_set_are_equally_likely(size: int) -> None:
    draws = 60_000
    keys = np.random.default_rng(size).integers(0, 2**63, draws).astype(np.uint64)
    orders = np.stack([permute(np.full(draws, index), size, keys) for index in range(size)], axis=1)
    codes = orders @ size ** np.arange(size)
    expected = sorted(np.array(order) @ size ** np.arange(size) for order in itertools.permutations(range(size)))
    found, counts = np.unique(codes, return_counts=True)
    np.testing.assert_array_equal(found, expected)
    assert len(found) == math.factorial(size)
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("size", [50, 97, 256, 300])
def test_positions_and_pairs_of_neighbours_look_uniform(size: int) -> None:
    keys = np.array([[key("uniform", number)] for number in range(2000)], dtype=np.uint64)
    orders = permute(np.tile(np.arange(size), (2000, 1)), size, np.tile(keys, size))
    places = np.zeros((size, size))
    np.add.at(places, (np.broadcast_to(np.arange(size), orders.shape), orders), 1)
    # Rows and columns of the table each sum to the number of draws: (size - 1)^2 degrees of freedom.
    assert chisquare(places.ravel(), ddof=2 * size - 2).pvalue > 1e-4
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % size).ravel(), minlength=size)
    assert steps[0] == 0
    assert chisquare(steps[1:]).pvalue > 1e-4


def test_different_keys_give_unrelated_orders() -> None:
    first, second = (permute(np.arange(10_000), 10_000, number) for number in (1, 2))
    assert (first == second).sum() < 10  # one is expected of two random orders
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05

from __future__ import annotations

import math

import numpy as np
import pytest

from genscale.evaluation.modes import modes, stacked_classes


def test_every_mode_as_often_as_in_the_data_has_no_divergence() -> None:
    assert modes(np.arange(3000) % 1000, 1000) == (1000, 1000, pytest.approx(0))
    assert modes(np.array([0, 0, 1]), 2, np.array([200, 100])) == (2, 2, pytest.approx(0))


def test_one_mode_of_a_thousand() -> None:
    assert modes(np.full(50, 7), 1000) == (1, 1000, pytest.approx(math.log(1000)))


def test_divergence_is_that_of_the_formula() -> None:
    generated, real = np.array([0, 0, 0, 2]), np.array([1, 2, 3])
    expected = 0.75 * math.log(0.75 / (1 / 6)) + 0.25 * math.log(0.25 / 0.5)
    assert modes(generated, 3, real) == (2, 3, pytest.approx(expected))


def test_a_class_that_the_data_does_not_have_is_infinitely_far() -> None:
    assert modes(np.array([0, 1]), 2, np.array([5, 0])).divergence == math.inf


def test_divergence_of_a_perfect_generator_is_its_bias() -> None:
    random = np.random.default_rng(0)
    values = [modes(random.integers(100, size=5000), 100).divergence for _ in range(50)]
    assert np.mean(values) == pytest.approx(99 / (2 * 5000), rel=0.05)


def test_stacked_digits_make_a_thousand_classes() -> None:
    digits = np.array([[0, 0, 0], [0, 1, 2], [9, 9, 9]], dtype=np.uint8)
    assert stacked_classes(digits).tolist() == [0, 12, 999]

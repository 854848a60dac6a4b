"""Early stopping on made-up validation losses."""

import json
import math

import pytest

from genscale.recipe.training import EarlyStopping as EarlyStoppingRecipe
from genscale.training.early_stopping import EarlyStopping


def stops_at(values: list[float], **settings) -> tuple[int | None, EarlyStopping]:
    stopping = EarlyStopping(EarlyStoppingRecipe(**settings))
    for index, value in enumerate(values):
        if stopping.observe(10 * index, value):
            return index, stopping
    return None, stopping


def test_improving_values_never_stop():
    assert stops_at([5.0 - 0.01 * index for index in range(100)], patience=1)[0] is None


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_stops_after_patience_validations_without_improvement(patience):
    index, stopping = stops_at([3.0, 2.0, 2.5, 2.0, 2.1, 2.2, 2.3, 2.4], patience=patience)
    assert index == 1 + patience
    assert (stopping.best_step, stopping.best_value) == (10, 2.0)


def test_an_improvement_starts_the_count_again():
    assert stops_at([3.0, 3.1, 2.9, 3.0, 2.8, 3.0, 2.7], patience=2)[0] is None


def test_less_than_the_minimum_improvement_is_none():
    values = [3.0, 2.95, 2.91, 2.85]
    assert stops_at(values, patience=2, minimum_improvement=0.1)[0] == 2
    assert stops_at([3.0, 2.95, 2.85, 2.8], patience=2, minimum_improvement=0.1)[0] is None


def test_what_is_not_a_number_is_no_improvement():
    index, stopping = stops_at([math.nan, 3.0, math.nan, math.nan], patience=2)
    assert index == 3
    assert stopping.best_value == 3.0


def test_a_resumed_count_goes_on():
    values = [3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.1, 2.2]
    expected, _ = stops_at(values, patience=3)
    assert expected == 7
    for cut in range(len(values)):
        _, first = stops_at(values[:cut], patience=3)
        second = EarlyStopping(EarlyStoppingRecipe(patience=3))
        second.load(json.loads(json.dumps(first.state())))
        assert [second.observe(10 * i, values[i]) for i in range(cut, 8)] == [i == 7 for i in range(cut, 8)]

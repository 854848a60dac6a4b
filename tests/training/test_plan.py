"""Amounts become numbers, and micro-batches the same ones on any number of ranks."""

from __future__ import annotations

import pytest

from genscale.recipe.load import recipe_from_mapping
from genscale.runtime.errors import UserError
from genscale.training.plan import make_plan, micro_batches


def test_amounts_become_samples_and_steps() -> None:
    training = {
        "budget": "2 epochs",
        "batch": "1k tokens",
        "validation": {"every": "10%", "amount": "500 tokens"},
        "checkpoints": {"every": "3 steps", "keep_every": "50%"},
        "average": {"half_life": "2 steps"},
    }
    plan = make_plan(recipe_from_mapping({"training": training, "model": {"context": 100}}), 400)
    assert (plan.batch, plan.steps) == (10, 80)
    assert (plan.validate_every, plan.validation_windows) == (80, 5)
    assert (plan.checkpoint_every, plan.keep_every, plan.half_life) == (30, 400, 20)
    assert [step for step in range(80) if plan.due(plan.validate_every, step)] == list(range(7, 80, 8))


def test_an_interval_is_at_least_a_step_however_small_the_budget() -> None:
    training = {
        "budget": "2 steps",
        "batch": "4 samples",
        "validation": {"every": "5%", "amount": "1%"},
        "checkpoints": {"every": "1%", "keep_every": "10%"},
        "average": {"half_life": "1%"},
    }
    plan = make_plan(recipe_from_mapping({"training": training, "model": {"context": 100}}), 400)
    assert (plan.steps, plan.validate_every, plan.checkpoint_every, plan.keep_every) == (2, 4, 4, 4)
    assert (plan.validation_windows, plan.half_life) == (1, 1)
    assert all(plan.due(plan.validate_every, step) for step in range(2))


def test_a_batch_below_one_sample_is_refused() -> None:
    recipe = recipe_from_mapping({"training": {"batch": "300 tokens"}, "model": {"context": 100}})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"context": 1000})})
    with pytest.raises(UserError, match=r"training\.batch: '300 tokens' is less than one sample \(1000 tokens\)"):
        make_plan(recipe, 400)


@pytest.mark.parametrize(("batch", "micro_batch"), [(64, 8), (10, 4), (7, 7), (9, 1)])
def test_micro_batches_are_the_same_on_any_number_of_ranks(batch: int, micro_batch: int) -> None:
    alone = micro_batches(batch, micro_batch, 0, 1)
    assert [position for start, stop in alone for position in range(start, stop)] == list(range(batch))
    for ranks in (2, 3, 5):
        together = [each for rank in range(ranks) for each in micro_batches(batch, micro_batch, rank, ranks)]
        assert sorted(together) == alone

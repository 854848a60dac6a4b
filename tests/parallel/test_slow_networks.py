"""Training that says less to other ranks: through the loop, on real processes, with resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_same_curve, back_at_step_10, curve, train_all

from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

MakeRecipe = Callable[..., Recipe]

SETTINGS: dict[str, Any] = {
    "training.budget": "20 steps",
    "training.optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "training.validation.every": "10 steps",
    "training.checkpoints": {"every": "10 steps", "keep_last": 9},
    "layout.micro_batch": 2,
}
APART = {"groups": 2, "every": 5}
SHARED: dict[str, Any] = {"training.low_communication": APART}
STREAMED = {**APART, "fragments": 2, "overlap": 1, "bits": 8}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "apart": (2, "causal", SHARED),
    "apart, streamed, in shards": (4, "causal", {"training.low_communication": STREAMED, "layout.shard": 2}),
    "apart, GAN": (2, "adversarial", SHARED),
    "apart, diffusion": (2, "edm", SHARED),
    "bf16": (2, "causal", {"layout.compression": "bf16"}),
    "powersgd": (2, "adversarial", {"layout.compression": "powersgd", "layout.compression_rank": 2}),
}


@pytest.mark.slow
def test_a_run_that_says_less_resumes_to_the_bit_and_learns(recipe_of: MakeRecipe, tmp_path: Path) -> None:
    def recipe(name: str, case: str) -> Recipe:
        _, kind, settings = CASES[case]
        return recipe_of(kind, **{**SETTINGS, **settings, "run": str(tmp_path / name)})

    sizes = {size for size, _, _ in CASES.values()}
    for size in sizes:
        cases = [case for case, (ranks, _, _) in CASES.items() if ranks == size]
        runs = train_all({case: recipe(case, case) for case in cases}, size, tmp_path)
        for case, run in runs.items():
            back_at_step_10(run, tmp_path / f"{case} again")
        again = train_all({f"{case} again": recipe(f"{case} again", case) for case in cases}, size, tmp_path)
        for case, run in runs.items():
            resumed = curve(again[f"{case} again"])
            if case == "powersgd":  # errors are kept as their sum, so not to the bit
                assert resumed == pytest.approx(curve(run), rel=1e-3)
            else:
                assert resumed == curve(run), case
            traffic = run.facts["traffic"]
            assert traffic["bytes"] == sum(row["bytes"] for row in traffic["sent"]) > 0
            assert 0 <= traffic["waiting_seconds"] <= traffic["seconds"]
            assert any(event["kind"] == "traffic" for event in run.events())


@pytest.mark.slow
def test_groups_that_exchange_at_every_step_by_the_plain_mean_stay_together(
    recipe_of: MakeRecipe, tmp_path: Path
) -> None:
    """With SGD-like steps the mean of the groups' weights is data parallel; with AdamW it is near to it."""
    plain = {**APART, "every": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    recipes = {
        "together": recipe_of("causal", **SETTINGS, run=str(tmp_path / "together")),
        "every step": recipe_of(
            "causal", **SETTINGS, **{"training.low_communication": plain}, run=str(tmp_path / "every step")
        ),
    }
    runs = train_all(recipes, 2, tmp_path)
    assert_same_curve(runs["every step"], runs["together"], rel=2e-2)
    assert runs["every step"].facts["low_communication"]["bytes_sent"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SHARED, "training.average": {"half_life": "5 steps"}}, "groups that train apart have no common average"),
        ({"training.low_communication": {**APART, "overlap": 5}}, r"overlap \(5\) must be less than every \(5\)"),
        ({"layout.compression": "powersgd", "layout.shard": 2}, "compression 'powersgd' is for whole gradients"),
        ({"layout.offload": True}, "it needs shard of 2 or more"),
    ],
)
def test_what_does_not_go_together_is_one_line(recipe_of: MakeRecipe, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of("causal", **settings)

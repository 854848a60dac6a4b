"""The loop's promises: the curve does not depend on the layout, bad steps are survived, nothing is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training import loop
from genscale.training.restore import load_objective
from genscale.training.run import train

MakeRecipe = Callable[..., Recipe]


KINDS = ("causal", "masked", "infill", "flow", "edm", "ddpm", "adversarial")


def losses(run: Run) -> list[float]:
    """Of every step, and of every phase in it."""
    names = ("loss", "discriminator_loss", "generator_loss")
    return [line[name] for line in run.metrics() for name in names if name in line]


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_objective(run, "last", "cpu").networks.state_dict()


def assert_same_to_the_bit(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_does_not_change_the_loss_curve(recipe_of: MakeRecipe, kind: str, tmp_path: Path) -> None:
    curves = []
    for micro_batch in (8, 4, 2, 3):
        settings = {"training.budget": "8 steps", "layout.micro_batch": micro_batch}
        run = train(recipe_of(kind, run=str(tmp_path / str(micro_batch)), **settings), show_progress=False)
        curves.append(losses(run))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-5)
    assert len(set(curves[0])) == len(curves[0]), "the weights change at every step"


@pytest.mark.parametrize("kind", KINDS)
def test_golden_curve(recipe_of: MakeRecipe, kind: str) -> None:
    """The losses of this recipe as they were when it was written: a change here changes every user's runs."""
    golden = json.loads(Path(__file__).with_name("golden_curves.json").read_text())
    run = train(recipe_of(kind, **{"training.budget": "10 steps"}), show_progress=False)
    assert losses(run) == pytest.approx(golden[kind], rel=1e-4)


def test_the_same_recipe_gives_the_same_weights_to_the_bit(recipe: MakeRecipe, tmp_path: Path) -> None:
    settings = {"model.dropout": 0.1, "training.budget": "6 steps"}
    runs = [train(recipe(run=str(tmp_path / name), **settings), show_progress=False) for name in "ab"]
    assert_same_to_the_bit(final_weights(runs[0]), final_weights(runs[1]))


def test_early_stopping_restores_the_best(recipe: MakeRecipe) -> None:
    settings = {
        "training.budget": "400 steps",
        "training.optimizer.learning_rate": 0.05,
        "training.schedule": {"kind": "constant"},
        "training.validation.every": "4 steps",
        "training.early_stopping": {"patience": 2, "minimum_improvement": 0.02},
    }
    run = train(recipe(**settings), show_progress=False)
    scores = {line["step"]: line["validation_loss"] for line in run.metrics() if "validation_loss" in line}
    best = min(scores, key=scores.__getitem__)
    assert run.facts["stopped_early"]
    assert run.facts["step"] < 400
    assert run.facts["best"] == {"step": best, "loss": scores[best]}
    exported = load_file(run.weights / "model.safetensors")
    assert_same_to_the_bit(exported, load_objective(run, best, "cpu").networks["model"].state_dict())
    assert any(event["kind"] == "early_stop" for event in run.events())


def test_a_non_finite_loss_is_skipped_then_rolled_back_and_training_goes_on(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.accumulate
    poisoned = {15, 16, 17}

    def poison(job, phase, step):
        measured = original(job, phase, step)
        return measured | {"loss": math.nan} if step in poisoned else measured

    monkeypatch.setattr(loop, "accumulate", poison)
    run = train(recipe(**{"training.guard": {"patience": 3, "window": 8}}), show_progress=False)
    kinds = [event["kind"] for event in run.events()]
    assert kinds.count("bad_step") == 3
    assert kinds.count("rollback") == 1
    assert run.facts["status"] == "finished"
    assert run.facts["step"] == 30
    logged = [line["step"] for line in run.metrics() if "loss" in line]
    assert len(logged) == len(set(logged)), "no step stands twice in the metrics"
    assert not poisoned & {step - 1 for step in logged}


def test_a_run_that_stays_bad_gives_up_with_one_line(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.accumulate
    monkeypatch.setattr(
        loop,
        "accumulate",
        lambda job, phase, step: original(job, phase, step) | ({"loss": math.inf} if step > 8 else {}),
    )
    with pytest.raises(UserError, match="try a lower learning rate"):
        train(recipe(**{"training.guard": {"patience": 2, "rollbacks": 1, "window": 8}}), show_progress=False)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": "adamw", "learning_rate": 5e-3},
        {"kind": "muon", "learning_rate": 0.02},
        {"kind": "adafactor", "learning_rate": 0.02},
        {"kind": "schedule_free", "learning_rate": 5e-3},
    ],
    ids=lambda optimizer: optimizer["kind"],
)
def test_stopped_and_resumed_equals_undisturbed_to_the_bit(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict
) -> None:
    settings = {
        "training.optimizer": optimizer,
        "training.average": {"half_life": "20%"},
        "training.budget": "12 steps",
        "model.dropout": 0.1,
    }
    undisturbed = train(recipe(run=str(tmp_path / "undisturbed"), **settings), show_progress=False)

    class PowerCut(Exception):
        pass

    original = loop.train_step
    cuts = [3, 7, 8]

    def cut(job, step):
        if cuts and step == cuts[0]:
            cuts.pop(0)
            raise PowerCut
        return original(job, step)

    monkeypatch.setattr(loop, "train_step", cut)
    disturbed = recipe(run=str(tmp_path / "disturbed"), **settings)
    for _ in range(3):
        with pytest.raises(PowerCut):
            train(disturbed, show_progress=False)
    run = train(disturbed, show_progress=False)
    assert_same_to_the_bit(final_weights(run), final_weights(undisturbed))
    assert losses(run) == losses(undisturbed)


def test_fp16_and_bf16_follow_fp32(recipe: MakeRecipe, tmp_path: Path) -> None:
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        settings = {"training.budget": "10 steps", "layout.precision": precision}
        curves[precision] = losses(train(recipe(run=str(tmp_path / precision), **settings), show_progress=False))
    assert curves["bf16"] == pytest.approx(curves["fp32"], rel=0.02)
    assert curves["fp16"] == pytest.approx(curves["fp32"], rel=0.01)


def test_a_finished_run_is_returned_as_it_is(recipe: MakeRecipe) -> None:
    first = train(recipe(**{"training.budget": "3 steps"}), show_progress=False)
    before = (first.directory / "metrics.jsonl").read_bytes()
    train(recipe(**{"training.budget": "3 steps"}), show_progress=False)
    assert (first.directory / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_directory_is_refused(recipe: MakeRecipe) -> None:
    train(recipe(**{"training.budget": "2 steps"}), show_progress=False)
    with pytest.raises(UserError, match=r"training\.budget: 2 steps -> 3 steps"):
        train(recipe(**{"training.budget": "3 steps"}), show_progress=False)


def test_a_game_that_is_lost_is_told_of_once(recipe_of: MakeRecipe) -> None:
    run = train(
        recipe_of(
            "adversarial",
            **{
                "model": {"kind": "gan", "latent": 4, "generator": [2], "discriminator": [32], "group_width": None},
                "objective": {"kind": "adversarial", "loss": "non_saturating", "r1": 0.0, "r2": 0.0},
                "training.budget": "200 steps",
                "training.batch": "64 samples",
                "training.optimizer.learning_rate": 0.03,
                "training.validation.every": "100 steps",
                "layout.micro_batch": 64,
            },
        ),
        show_progress=False,
    )
    told = {event["kind"]: event for event in run.events()}
    for kind in ("collapse", "discriminator_wins"):
        assert [event["kind"] for event in run.events()].count(kind) == 1
        assert told[kind]["step"] * 64 >= 10_000
        assert "try" in told[kind]["message"]

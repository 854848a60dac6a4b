"""A checkpoint saved on any layout goes on with any other: weights, optimizer and averages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_same_curve, back_at_step_10, train_all

from genscale.recipe.schema import Recipe
from genscale.runs.run import Run

MakeRecipe = Callable[..., Recipe]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "replicate": (2, {"replicate": 2}),
    "shard": (2, {"shard": 2}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2, "schedule": "interleaved"}),
    "shard-tensor": (4, {"shard": 2, "tensor": 2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "expert": (2, {"expert": 2}),
    "shard-expert": (4, {"shard": 2, "expert": 2}),
}
SETTINGS: dict[str, Any] = {
    "training.budget": "20 steps",
    "training.validation.every": "10 steps",
    "training.checkpoints": {"every": "10 steps", "keep_last": 9},
    "training.average": {"half_life": "5 steps"},
    "layout.micro_batch": 2,
}
GENTLE: dict[str, Any] = {"kind": "adamw", "learning_rate": 1e-3}
MUON: dict[str, Any] = {"kind": "muon", "learning_rate": 1e-3, "rest": {"learning_rate": 3e-4}}
TEXT = {"model.layers": 4, "model.heads": 4, "training.optimizer": MUON}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, dict[str, Any]]]]] = {
    "text, muon": ("causal", TEXT, LAYOUTS),
    "experts, adamw": (
        "causal",
        {"model.mixture": {"experts": 4, "balance": "bias"}, "training.optimizer": GENTLE},
        EXPERT_LAYOUTS,
    ),
    "GAN": (
        "adversarial",
        {"training.optimizer": GENTLE},
        {name: LAYOUTS[name] for name in ("single", "replicate", "shard")},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saved_on_any_layout_loaded_on_any_other(recipe_of: MakeRecipe, tmp_path: Path, case: str) -> None:
    kind, model, layouts = CASES[case]

    def recipe(name: str, layout: str) -> Recipe:
        laid = {f"layout.{key}": value for key, value in layouts[layout][1].items()}
        return recipe_of(kind, **{**SETTINGS, **model, **laid, "run": str(tmp_path / name)})

    def all_of(names: dict[str, str]) -> dict[str, Run]:
        """Runs by name, each on its layout."""
        by_size: dict[int, dict[str, Recipe]] = defaultdict(dict)
        for name, layout in names.items():
            by_size[layouts[layout][0]][name] = recipe(name, layout)
        return {
            name: run for size, recipes in by_size.items() for name, run in train_all(recipes, size, tmp_path).items()
        }

    saved = all_of({layout: layout for layout in layouts})
    moved = {f"{one}-to-{other}": other for one in layouts for other in layouts if one != other}
    for name in moved:
        back_at_step_10(saved[name.partition("-to-")[0]], tmp_path / name)
    for name, run in all_of(moved).items():
        assert any(event["kind"] == "resume" for event in run.events()), name
        assert_same_curve(run, saved["single"])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_of_a_damaged_shard_the_checkpoint_before_it_is_used_by_all_ranks(
    recipe_of: MakeRecipe, tmp_path: Path, damage: str
) -> None:
    settings = {**SETTINGS, **TEXT, "training.checkpoints": {"every": "5 steps", "keep_last": 9}, "layout.shard": 2}
    first = train_all({"first": recipe_of("causal", **settings, run=str(tmp_path / "first"))}, 2, tmp_path)["first"]
    back_at_step_10(first, tmp_path / "again")
    shard = tmp_path / "again" / "checkpoints" / "step-00000010" / "rank-00001.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    again = train_all({"again": recipe_of("causal", **settings, run=str(tmp_path / "again"))}, 2, tmp_path)["again"]
    [told] = [event["message"] for event in again.events() if event["kind"] == "damaged_checkpoint"]
    assert "step-00000010 is damaged" in told
    assert "rank-00001.safetensors" in told
    assert any("going on from step 5 of 20" in event["message"] for event in again.events())
    assert_same_curve(again, first, rel=0)

"""Every layout gives the loss curve of one process: layouts x objectives, on real processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import assert_same_curve, gradient_norms, train_all
from ranks import Ranks, codes, lines

from genscale.recipe.layout import AXES, Layout
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

WHOLE: dict[str, dict[str, Any]] = {
    "DDP": {"replicate": 2},
    "FSDP2": {"shard": 2},
    "HSDP": {"replicate": 2, "shard": 2},
}
"""For every model."""
STACKED: dict[str, dict[str, Any]] = {
    "TP": {"tensor": 2, "sequence": False},
    "TP+SP": {"tensor": 2},
    "PP gpipe": {"pipeline": 2, "schedule": "gpipe"},
    "PP 1f1b": {"pipeline": 2, "schedule": "1f1b"},
    "PP interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "PP zero bubble": {"pipeline": 2, "schedule": "zero_bubble"},
    "CP ring": {"context": 2, "attention": "ring"},
    "CP all-gather": {"context": 2, "attention": "all_gather"},
    "FSDP+TP": {"shard": 2, "tensor": 2},
    "FSDP+PP": {"shard": 2, "pipeline": 2},
    "FSDP+CP": {"shard": 2, "context": 2},
    "FSDP+TP+PP": {"shard": 2, "tensor": 2, "pipeline": 2},
}
"""For stacks of transformer blocks."""
EXPERTS: dict[str, dict[str, Any]] = {
    "EP": {"expert": 2},
    "FSDP+EP": {"shard": 2, "expert": 2},
    "EP+TP": {"expert": 2, "tensor": 2},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "FSDP2 offloaded": {"shard": 2, "offload": True},
    "FSDP2 selectively recomputed": {"shard": 2, "recompute": "selective"},
    "TP recomputed": {"tensor": 2, "recompute": "full"},
    "CP recomputed": {"context": 2, "recompute": "full"},
}
FEW = {name: STACKED[name] for name in ("TP+SP", "PP 1f1b", "CP ring", "CP all-gather")}

TEXT = {"model.layers": 4, "model.heads": 4, "model.key_value_heads": 2, "model.within_documents": True}
MIXTURE = {**TEXT, "model.mixture": {"experts": 4, "active": 2, "shared": 1, "z_loss": 1e-3}}
TRANSFORMER = {"kind": "diffusion_transformer", "layers": 4, "width": 32, "heads": 4, "patch": 2}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "text": ("causal", TEXT, WHOLE | STACKED | OPTIONS),
    "masked text": ("masked", TEXT, FEW),
    "infilled text": ("infill", {**TEXT, "model.within_documents": False, "objective.form": "spans"}, FEW),
    "text with experts": ("causal", MIXTURE, WHOLE | STACKED | EXPERTS),
    "diffusion transformer": ("flow", {"model": TRANSFORMER}, WHOLE | STACKED),
    "GAN": ("adversarial", {"objective.augmentation": {"flip": True, "translate": 0.2}}, WHOLE),
}
SETTINGS: dict[str, Any] = {
    "training.budget": "20 steps",
    # At higher rates differences in rounding, which ranks cannot avoid, grow from step to step.
    "training.optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "training.validation.every": "10 steps",
    "training.checkpoints.every": "20 steps",
    "training.average": {"half_life": "5 steps"},
    "layout.micro_batch": 2,
}


def processes(layout: dict[str, Any]) -> int:
    size = 1
    for axis in AXES:
        size *= layout.get(axis, 1)
    return size


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_loss_curve_of_one_process(recipe_of: MakeRecipe, tmp_path: Path, case: str) -> None:
    kind, model, layouts = CASES[case]

    def recipe(name: str, layout: dict[str, Any]) -> Recipe:
        laid = {f"layout.{key}": value for key, value in layout.items()}
        return recipe_of(kind, **{**SETTINGS, **model, **laid, "run": str(tmp_path / name)})

    alone = train_all({"alone": recipe("alone", {})}, 1, tmp_path)["alone"]
    by_size: dict[int, dict[str, Recipe]] = defaultdict(dict)
    for name, layout in layouts.items():
        by_size[processes(layout)][name] = recipe(name, layout)
    for size, recipes in by_size.items():
        for name, run in train_all(recipes, size, tmp_path).items():
            assert run.facts["ranks"] == size, name
            assert_same_curve(run, alone)
            # A token at a near tie goes to another expert where rounding differs, which the norm shows before the loss.
            near = 1e-4 if "mixture" not in repr(model) else 1e-3
            assert gradient_norms(run) == pytest.approx(gradient_norms(alone), rel=near), name
            for file in alone.weights.iterdir():
                assert (run.weights / file.name).stat().st_size == file.stat().st_size, name


def test_the_axes_of_a_layout_multiply_to_the_processes() -> None:
    assert Layout(shard=2, tensor=4).sizes(16) == dict.fromkeys(AXES, 1) | {"replicate": 2, "shard": 2, "tensor": 4}
    assert Layout().sizes(3)["replicate"] == 3
    with pytest.raises(ValueError, match="shard 2 x tensor 4 needs 8 processes, but there are 12"):
        Layout(shard=2, tensor=4).sizes(12)
    with pytest.raises(ValueError, match="replicate 2 needs 2 processes, but there is 1"):
        Layout(replicate=2).sizes(1)


def test_an_image_whose_patches_cannot_be_shared_is_one_line(recipe_of: MakeRecipe, tmp_path: Path) -> None:
    recipe = recipe_of("flow", **{"model": {**TRANSFORMER, "patch": 4}, "layout.context": 4})  # 4 tokens for 8 portions
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_to_yaml(recipe))
    program = f"""
from genscale.cli.main import main
main(["train", {str(file)!r}])
"""
    ended = Ranks(program, 4).end(60)
    assert codes(ended) == [2] * 4
    [line] = [line for line in lines(ended) if line.startswith("error: ")]
    assert "model.patch (4) of 8 pixels (4 tokens) must be a multiple of twice layout.context (4)" in line

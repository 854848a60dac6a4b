"""Layouts of thousands of processes, counted on pretended ones, against their closed form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genscale.planning.simulate import simulate
from genscale.recipe.load import load_recipe
from genscale.recipe.model import TransformerModel
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError


def part(rows: int, shard: int, rank: int = 0) -> int:
    """Rows of a shard: equal parts but for the last ones, as torch.chunk makes them."""
    each = -(-rows // shard)
    return max(0, min(each, rows - rank * each))


def held_by_rank_0(recipe: Recipe, vocabulary: int, layers: int, first: bool, last: bool) -> int:
    """Numbers of parameters on rank 0 of each axis, of a pipeline's stage with so many layers. Rows of a matrix that
    tensor parallelism splits by rows are split once more by FSDP; those it splits by columns are split by rows."""
    shape, layout = recipe.model, recipe.layout
    assert isinstance(shape, TransformerModel)
    tensor, shard, width = layout.tensor, layout.shard, shape.width
    heads, groups = shape.heads * shape.width_of_head, (shape.key_value_heads or shape.heads) * shape.width_of_head
    by_rows = [(heads, width), (groups, width), (groups, width), (shape.width_of_hidden, width)]
    by_rows += [(shape.width_of_hidden, width)] * shape.gated
    by_columns = [(width, heads), (width, shape.width_of_hidden)]
    block = sum(part(rows // tensor, shard) * columns for rows, columns in by_rows)
    block += sum(part(rows, shard) * (columns // tensor) for rows, columns in by_columns)
    block += 2 * part(width, shard)  # norms
    table = part(part(vocabulary, tensor), shard) * width
    ends = (first + (last and not shape.tied_head)) * table + last * part(width, shard)
    return layers * block + ends


def test_a_rank_of_1024_holds_what_the_closed_form_says_of_70b() -> None:
    recipe = load_recipe("70b", ["layout.shard=128", "layout.tensor=8"])
    held = simulate(recipe, 1024)
    numbers = held_by_rank_0(recipe, 128_256, layers=80, first=True, last=True)
    assert held.parameter_bytes == held.gradient_bytes == 4 * numbers
    assert held.optimizer_bytes == 8 * numbers
    assert held.seconds < 120


@pytest.mark.parametrize(
    ("stage", "layers"),
    # The last of 16 stages has 7 layers and the head; 119 are left for 15, so that one of them has 7.
    [(0, 7), (1, 8), (15, 7)],
)
def test_a_rank_of_16384_holds_what_the_closed_form_says_of_405b(stage: int, layers: int) -> None:
    recipe = load_recipe("405b")
    held = simulate(recipe, 16_384, rank=1024 * stage)
    numbers = held_by_rank_0(recipe, 128_256, layers, first=stage == 0, last=stage == 15)
    assert held.parameter_bytes == held.gradient_bytes == 4 * numbers
    assert held.optimizer_bytes == 8 * numbers
    assert held.seconds < 120


@pytest.mark.slow
def test_the_ranks_of_a_layout_hold_the_model_between_them(recipe_of: Callable[..., Recipe]) -> None:
    layout: dict[str, Any] = {"layout.shard": 2, "layout.tensor": 2, "layout.pipeline": 2, "model.layers": 4}
    recipe = recipe_of(
        "causal", **layout, **{"model.tied_head": False, "model.norm_scale": False, "model.query_key_norm": False}
    )
    held = [simulate(recipe, 8, rank) for rank in range(8)]
    assert sum(each.parameter_bytes for each in held) == 4 * held[0].parameters


def test_what_the_command_shows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genscale", "plan", "8b", "layout.shard=8", "--simulate", "8"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "8,030,261,248 parameters on 8 processes (shard 8), process 0:" in shown.stdout
    as_json = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)
    assert as_json["parameter_bytes"] * 8 == pytest.approx(4 * 8_030_261_248, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "ranks", "message"),
    [
        (["8b", "layout.tensor=3"], 3, "layout.tensor: 3 does not divide model.heads (32)"),
        (["8b", "layout.shard=4"], 6, "layout: shard 4 needs 4 processes, but there are 6"),
        (["8b", "layout.pipeline=64"], 64, "layout.pipeline: 64 stages are more than model.layers (32)"),
        (["8b", "layout.context=3"], 3, "model.context (8192 tokens) must be a multiple of twice layout.context (3)"),
        (["8b", "layout.expert=2"], 2, "layout.expert: the model has no experts"),
        (["fashion-mnist-gan", "layout.tensor=2"], 2, "layout.tensor: model.kind 'dcgan' is no stack of transformer"),
        (["fashion-mnist-diffusion", "layout.pipeline=2"], 2, "layout.pipeline: model.kind 'unet' is no stack"),
        (["8b", "layout.shard=2", "training.optimizer={kind: adafactor}"], 2, "layout.shard: adafactor's factors"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_line(recipe: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        simulate(load_recipe(recipe[0], recipe[1:]), ranks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

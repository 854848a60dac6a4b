"""Two layouts compared tensor by tensor, on real processes; and what is said of a tensor that was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import small_recipe

from genscale.cli.main import main
from genscale.planning.compare import Comparison, compare
from genscale.planning.trace import Trace
from genscale.planning.verify import laid_out, verify
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

TRANSFORMER = {"kind": "diffusion_transformer", "layers": 2, "width": 32, "heads": 2, "patch": 2}
SETTINGS: dict[str, Any] = {"training.optimizer": {"kind": "adamw", "learning_rate": 1e-3}, "layout.micro_batch": 4}
KEY = "networks.model.blocks.1.attention.key.weight"


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``genscale verify`` on a recipe: exit code, standard output, standard error."""

    def call(recipe: Recipe, *words: str) -> tuple[int, str, str]:
        file = tmp_path / "small.yaml"
        file.write_text(recipe_to_yaml(recipe))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["verify", str(file), *words])
        return exit.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]

    return call


@pytest.fixture(scope="module")
def kept(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """Both traces of a text model on tensor=2 and on one process, and what came of comparing them."""
    folder = tmp_path_factory.mktemp("verify")
    recipe = small_recipe(folder, small_store, **SETTINGS)
    layouts = laid_out(recipe, "tensor=2"), laid_out(recipe, "single")
    comparison = verify(*layouts, steps=2, show_progress=False, folder=folder / "traces")
    assert not Path(recipe.run_directory).exists()
    return folder / "traces", comparison


@pytest.fixture
def traces(kept: tuple[Path, Comparison], tmp_path: Path) -> tuple[Trace, Trace]:
    """Copies, which a test may damage."""
    shutil.copytree(kept[0], tmp_path / "traces")
    return Trace(tmp_path / "traces" / "layout-1", "tensor=2"), Trace(tmp_path / "traces" / "layout-2", "single")


def change(file: Path, name: str, by: float, at: int) -> float:
    """Add to one element of a tensor in a file; the tensor's largest absolute value."""
    tensors = load_file(file)
    tensors[name].view(-1)[at] += by
    save_file(tensors, file)
    return tensors[name].abs().max().item()


def test_tensor_parallel_text_agrees_with_one_process(kept: tuple[Path, Comparison]) -> None:
    comparison = kept[1]
    assert comparison.agrees, str(comparison)
    # 2 blocks, 2 micro-batches of 4, 2 steps; weights at the start as well
    assert comparison.compared["activation"] == 2 * 2 * 2
    assert comparison.compared["gradient"] * 3 == comparison.compared["weight"] * 2 > 0
    assert all(0 < worst.relative < 1e-5 for worst in comparison.worst.values())
    assert str(comparison).startswith("tensor=2 and single agree over 2 steps, within 0.0001 of each tensor:\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "layout"),
    [
        ("flow", {"model": TRANSFORMER}, "context=2"),
        ("adversarial", {}, "shard=2"),
        ("causal", {"model.layers": 4, "layout.micro_batch": 2}, "pipeline=2,schedule=interleaved,recompute=full"),
    ],
)
def test_other_layouts_agree_with_one_process(
    recipe_of: MakeRecipe, call: Any, kind: str, changes: dict[str, Any], layout: str
) -> None:
    recipe = recipe_of(kind, **{**SETTINGS, **changes})
    code, out, err = call(recipe, "--layout", layout, "--json")
    assert (code, err) == (0, ""), out
    said = json.loads(out)
    assert said["agrees"]
    assert all(count > 0 for count in said["compared"].values())
    assert not Path(recipe.run_directory).exists()


@pytest.mark.slow
def test_another_seed_differs_before_the_first_step(recipe_of: MakeRecipe) -> None:
    one, other = (laid_out(recipe_of("causal", **SETTINGS, seed=seed), "single") for seed in (3, 4))
    comparison = verify(one, other, steps=1, show_progress=False)
    assert comparison.difference is not None
    assert (comparison.difference.step, comparison.difference.kind) == (0, "weight")
    assert str(comparison).startswith("before the first step: the weight networks.model.embedding.weight differs by")


def test_a_changed_gradient_is_named_with_its_size(traces: tuple[Trace, Trace]) -> None:
    file = traces[0].folder / "step-0002" / "0-train" / "gradients-0000.safetensors"
    scale = change(file, KEY, by=0.5, at=35)
    comparison = compare(*traces, steps=2, tolerance=1e-4, order=[])
    found = comparison.difference
    assert found is not None
    assert (found.step, found.phase, found.kind, found.name) == (2, "train", "gradient", KEY)
    assert (found.elements, found.of, found.at) == (1, 32 * 32, (1, 3))
    assert found.largest == pytest.approx(0.5, rel=1e-4)
    assert found.scale == pytest.approx(scale, rel=1e-4)
    told = str(comparison)
    assert told.startswith(f"step 2, train: the gradient {KEY} differs by up to 0.5, which is ")
    assert "with 1 of 1,024 elements beyond 0.0001; most at [1, 3]: " in told
    assert "\n" not in told
    assert comparison.as_json["difference"]["name"] == KEY


def test_a_changed_weight_is_named(traces: tuple[Trace, Trace]) -> None:
    change(traces[1].folder / "step-0001" / "0-train" / "weights-0000.safetensors", KEY, by=0.01, at=0)
    found = compare(*traces, steps=2, tolerance=1e-4, order=[]).difference
    assert found is not None
    assert (found.step, found.kind, found.name, found.at) == (1, "weight", KEY, (0, 0))


def test_a_changed_activation_is_told_before_the_gradients(traces: tuple[Trace, Trace]) -> None:
    """On the second rank, which has the second half of the tokens."""
    change(traces[0].folder / "step-0001" / "0-train" / "gradients-0000.safetensors", KEY, by=0.5, at=0)
    file = traces[0].folder / "step-0001" / "0-train" / "activations-0001.safetensors"
    [name] = [name for name in load_file(file) if name.startswith("4/") and name.endswith("blocks.1")]
    change(file, name, by=3.0, at=0)
    comparison = compare(*traces, steps=2, tolerance=1e-4, order=[])
    found = comparison.difference
    assert found is not None
    assert (found.kind, found.name, found.position, found.at) == (
        "activation",
        "networks.model.blocks.1",
        4,
        (0, 16, 0),
    )
    assert str(comparison).startswith("step 1, train, samples from 4: the activation networks.model.blocks.1 differs")


def test_a_tensor_that_is_missing_or_of_another_shape_is_told(traces: tuple[Trace, Trace]) -> None:
    file = traces[0].folder / "step-0001" / "0-train" / "gradients-0000.safetensors"
    tensors = load_file(file)
    save_file({**tensors, KEY: torch.zeros(16, 32)}, file)
    told = str(compare(*traces, steps=2, tolerance=1e-4, order=[]))
    assert told.endswith(f"the gradient {KEY} has other shapes: (16, 32) with tensor=2 and (32, 32) with single")
    save_file({name: tensor for name, tensor in tensors.items() if name != KEY}, file)
    told = str(compare(*traces, steps=2, tolerance=1e-4, order=[]))
    assert told == f"step 1, train: the gradient {KEY} is there with single, and not with tensor=2"


def test_a_number_that_is_none_is_a_difference(traces: tuple[Trace, Trace]) -> None:
    change(traces[0].folder / "step-0001" / "0-train" / "gradients-0000.safetensors", KEY, by=float("nan"), at=7)
    comparison = compare(*traces, steps=2, tolerance=1e-4, order=[])
    assert comparison.difference is not None
    assert (comparison.difference.name, comparison.difference.at) == (KEY, (0, 7))
    json.dumps(comparison.as_json, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, ["--layout", "tensr=2"], "--layout 'tensr=2': no axis 'tensr', did you mean 'tensor'?"),
        ({}, ["--layout", "tensor"], "--layout 'tensor': expected axes such as tensor=2,shard=2, or single"),
        ({}, ["--layout", "tensor=two"], "--layout 'tensor=two': layout.tensor: expected a whole number, found 'two'"),
        ({}, ["--layout", "tensor=3"], "layout.tensor: 3 does not divide model.heads (2)"),
        (
            {},
            ["--layout", "shard=2", "--against", "pipeline=4"],
            "layout.pipeline: 4 stages are more than model.layers",
        ),
        ({"model.dropout": 0.1}, ["--layout", "tensor=2"], "so that nothing would be the same; set model.dropout=0"),
        ({}, ["--layout", "shard=4", "--json"], "layout.micro_batch: 4 samples are more than each rank's share"),
    ],
)
def test_what_cannot_be_verified_is_one_line(
    recipe_of: MakeRecipe, call: Any, changes: dict[str, Any], words: list[str], message: str
) -> None:
    code, out, err = call(recipe_of("causal", **SETTINGS, **changes), *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1

"""Two layouts compared tensor by tensor, on real processes; and what is said of a tensor that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genscale.cli.main import main
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

TRANSFORMER = {"kind": "diffusion_transformer", "layers": 2, "width": 32, "heads": 2, "patch": 2}
SETTINGS: dict[str, Any] = {"training.optimizer": {"kind": "adamw", "learning_rate": 1e-3}, "layout.micro_batch": 4}


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


@pytest.mark.parametrize(
    ("kind", "model", "layout", "counts"),
    [
        ("causal", {}, "tensor=2", (12, 45, 60)),
        pytest.param("flow", {"model": TRANSFORMER}, "context=2", (12, 0, 0), marks=pytest.mark.slow),
        pytest.param("adversarial", {}, "shard=2", (0, 0, 0), marks=pytest.mark.slow),
    ],
)
def test_layouts_that_agree(
    recipe_of: MakeRecipe, call: Any, kind: str, model: dict[str, Any], layout: str, counts: tuple[int, ...]
) -> None:
    recipe = recipe_of(kind, **{**SETTINGS, **model})
    code, out, err = call(recipe, "--layout", layout, "--json")
    print(out)
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["agrees"]
    assert tuple(said["compared"].values()) == counts
    assert all(worst["relative"] < 1e-4 for worst in said["worst"].values())
    assert not Path(recipe.run_directory).exists()

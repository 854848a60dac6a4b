"""Training runs on several layouts, in one start of the processes for each number of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ranks import Ranks

from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run

NAMES = ("loss", "discriminator_loss", "generator_loss", "validation_loss")

TRAIN = """
import json, traceback
from pathlib import Path
from genscale.recipe.load import load_recipe
from genscale.runtime.errors import UserError
from genscale.training.run import train

for name in json.loads(Path({names!r}).read_text()):
    print(">", name, flush=True)
    train(load_recipe(Path({folder!r}) / f"{{name}}.yaml"), show_progress=False)
"""


def train_all(recipes: dict[str, Recipe], size: int, folder: Path, seconds: float = 300) -> dict[str, Run]:
    """Train each of the recipes on ``size`` ranks, one after the other; runs by their names."""
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(recipe_to_yaml(recipe))
    names = folder / f"names-{size}.json"
    names.write_text(json.dumps(list(recipes)))
    ended = Ranks(TRAIN.format(names=str(names), folder=str(folder)), size).end(seconds)
    failed = {rank: end.printed[-6000:] for rank, end in ended.items() if end.code != 0}
    assert not failed, "\n".join(f"--- rank {rank}\n{text}" for rank, text in failed.items())
    return {name: Run.open(recipe.run_directory) for name, recipe in recipes.items()}


def curve(run: Run) -> list[float]:
    """Losses of all steps, phase by phase, then of all validations."""
    records = run.metrics()
    return [record[name] for name in NAMES for record in records if name in record]


def assert_same_curve(run: Run, alone: Run, rel: float = 1e-5) -> None:
    found, expected = curve(run), curve(alone)
    assert len(found) == len(expected) > 0, run.directory
    apart = [abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True)]
    assert found == pytest.approx(expected, rel=rel), f"{run.directory.name}: {[f'{each:.0e}' for each in apart]}"


def gradient_norms(run: Run) -> list[float]:
    return [value for record in run.metrics() for name, value in record.items() if name.endswith("gradient_norm")]


def back_at_step_10(run: Run, copy: Path) -> None:
    """A copy of a finished run as it was when it had its checkpoint of step 10 and no later one."""
    shutil.copytree(run.directory, copy, ignore=shutil.ignore_patterns("lock", "weights"))
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > 10:
            shutil.rmtree(later)
    facts = json.loads((copy / "facts.json").read_text())
    (copy / "facts.json").write_text(json.dumps(facts | {"status": "running"}))

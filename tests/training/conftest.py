"""A small real corpus and a recipe that trains on it in seconds."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from genscale.data.prepare import prepare
from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.schema import Recipe

MODULES = ("abc", "argparse", "ast", "bisect", "calendar", "csv", "dataclasses", "enum", "heapq", "inspect", "queue")


def small_recipe(folder: Path, store: Path, **overrides: object) -> Recipe:
    """About 20,000 parameters; ``training.budget`` and so on as overrides of dotted keys."""
    library = Path(sysconfig.get_path("stdlib"))
    mapping: dict = {
        "name": "small",
        "seed": 3,
        "run": str(folder / "run"),
        "data": {
            "sources": [{"path": str(library / f"{name}.py"), "licence": "PSF-2.0"} for name in MODULES],
            "store": str(store),
            "tokenizer": {"kind": "bpe", "vocabulary": 300},
            "split": {"by": "tail", "validation": 0.05},
        },
        "model": {"layers": 2, "width": 32, "heads": 2, "context": 32, "query_key_norm": True},
        "training": {
            "budget": "30 steps",
            "batch": "8 samples",
            "optimizer": {"kind": "adamw", "learning_rate": 5e-3},
            "validation": {"every": "10 steps", "amount": "8 samples"},
            "checkpoints": {"every": "5 steps"},
            "log_every": 1,
        },
        "layout": {"device": "cpu", "precision": "fp32", "compile": False, "micro_batch": 8},
        "sampling": {"prompts": ["def "], "tokens": 4},
    }
    for key, value in overrides.items():
        *path, last = key.split(".")
        part = mapping
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
    return recipe_from_mapping(mapping)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared store of :func:`small_recipe`, made once."""
    folder = tmp_path_factory.mktemp("store")
    return prepare(small_recipe(folder, folder / "small"), workers=1).path


@pytest.fixture
def recipe(tmp_path: Path, small_store: Path) -> Callable[..., Recipe]:
    """``recipe(**{"training.budget": "5 steps"})``, each with the test's own run directory."""
    return lambda **overrides: small_recipe(tmp_path, small_store, **overrides)

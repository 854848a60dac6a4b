"""Small real data and recipes that train on it in seconds, for each family of models."""

from __future__ import annotations

import copy
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
    return overridden(mapping, overrides)


IMAGE_MODELS: dict[str, dict] = {
    "unet": {"kind": "unet", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": [1], "head_width": 16},
    "diffusion_transformer": {"kind": "diffusion_transformer", "layers": 2, "width": 32, "heads": 2, "patch": 2},
    "gan": {
        "kind": "gan",
        "latent": 8,
        "generator": [32, 16],
        "discriminator": [16, 32],
        "group_width": 8,
        "embedding": 8,
    },
}
MODEL_OF = {"flow": "unet", "edm": "diffusion_transformer", "ddpm": "unet", "adversarial": "gan"}


def small_image_recipe(folder: Path, store: Path, kind: str, **overrides: object) -> Recipe:
    """Digits of 8 x 8 pixels; ``kind`` is the objective's."""
    mapping: dict = {
        "name": "small",
        "seed": 3,
        "run": str(folder / "run"),
        "data": {"kind": "images", "sources": ["builtin:digits"], "store": str(store), "resolution": 8, "channels": 1},
        "model": IMAGE_MODELS[MODEL_OF[kind]],
        "objective": {"kind": kind},
        "training": {
            "budget": "30 steps",
            "batch": "8 samples",
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
            "validation": {"every": "10 steps", "amount": "16 samples"},
            "checkpoints": {"every": "5 steps"},
            "log_every": 1,
        },
        "layout": {"device": "cpu", "precision": "fp32", "compile": False, "micro_batch": 8},
        "sampling": {"kind": "images", "count": 4, "steps": 2},
    }
    return overridden(mapping, overrides)


def overridden(mapping: dict, overrides: dict[str, object]) -> Recipe:
    mapping = copy.deepcopy(mapping)  # parts of it are shared by all tests
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


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared store of :func:`small_image_recipe`, made once."""
    folder = tmp_path_factory.mktemp("digits")
    return prepare(small_image_recipe(folder, folder / "digits", "flow"), workers=1).path


@pytest.fixture
def recipe_of(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Recipe]:
    """``recipe_of("adversarial", **overrides)``: of any objective, each with the test's own run directory."""

    def recipe_of(kind: str, **overrides: object) -> Recipe:
        if kind in MODEL_OF:
            return small_image_recipe(tmp_path, request.getfixturevalue("digits_store"), kind, **overrides)
        return small_recipe(tmp_path, request.getfixturevalue("small_store"), **{"objective.kind": kind, **overrides})

    return recipe_of

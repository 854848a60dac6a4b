"""Train a generative model from raw data to a shipped model.

The Python API has the verbs of the command line::

    import genscale

    recipe = genscale.load_recipe("tiny", ["data.sources=['notes/*.txt']"])
    genscale.prepare(recipe)
    run = genscale.train(recipe)
    print(genscale.sample(run, "Once")[0].text)
    genscale.report(run)

Each name is imported when it is first used, so that ``import genscale`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from genscale.data.prepare import prepare
    from genscale.data.store import Store
    from genscale.evaluation.run import evaluate
    from genscale.generation.run import sample
    from genscale.recipe.load import load_recipe
    from genscale.recipe.schema import Recipe
    from genscale.runs.run import Run
    from genscale.runtime.errors import UserError
    from genscale.training.run import train

_HOMES = {
    "load_recipe": "recipe.load",
    "prepare": "data.prepare",
    "train": "training.run",
    "sample": "generation.run",
    "evaluate": "evaluation.run",
    "Recipe": "recipe.schema",
    "Run": "runs.run",
    "Store": "data.store",
    "UserError": "runtime.errors",
}

__all__ = [
    "Recipe",
    "Run",
    "Store",
    "UserError",
    "__version__",
    "evaluate",
    "load_recipe",
    "prepare",
    "report",
    "sample",
    "train",
]


def report(run: Run | str | Path) -> Path:
    """Write ``report.html`` of a run, given as a :class:`Run` or its directory, and return its path."""
    from genscale.reports.report import write_report
    from genscale.runs.run import Run

    return write_report(run if isinstance(run, Run) else Run.open(run))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("genscale")
    if name not in _HOMES:
        raise AttributeError(f"module 'genscale' has no attribute '{name}'")
    return getattr(import_module(f"genscale.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

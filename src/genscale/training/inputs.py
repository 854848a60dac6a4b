"""What a run takes from its data: the streams, and the facts that the rest needs to know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genscale.data.prepare import prepare
from genscale.data.store import Store
from genscale.data.stream import Stream
from genscale.generation.text import generate
from genscale.objectives.objective import Objective
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.progress import StageDisplay
from genscale.runtime.randomness import key
from genscale.runtime.world import from_rank_0


@dataclass
class Inputs:
    """The prepared data of a run, whatever its kind."""

    fingerprint: str
    stream: Stream
    validation: Stream
    tokens_per_sample: int
    vocabulary: int
    facts: dict[str, Any]
    """What the run records about its data."""
    keep_with: Callable[[Path], None]
    """Copies into the run directory what sampling needs, so that a run samples without its store."""
    preview: Callable[[Objective], list[dict[str, Any]]]
    """The samples that the report shows."""


def open_inputs(recipe: Recipe, show_progress: bool | None) -> Inputs:
    """Open the recipe's stores, preparing the one that is not there yet.

    Raises:
        UserError: no store and no sources, or a store made otherwise than the recipe says.
    """
    from_rank_0(lambda: _prepare_where_needed(recipe, show_progress))
    paths = list(recipe.data.mixture or [recipe.store_directory])
    stores = [Store.open(path) for path in paths]
    weights = list(recipe.data.mixture.values()) if recipe.data.mixture else None
    first = stores[0]
    context = recipe.model.context
    identity = [store.fingerprint for store in stores] + [str(weight) for weight in weights or []]
    return Inputs(
        fingerprint=first.fingerprint if len(stores) == 1 else f"{key(*identity):016x}",
        stream=Stream(stores, weights, "train", context, recipe.seed),
        validation=Stream(stores, weights, "validation", context, recipe.seed),
        tokens_per_sample=context,
        vocabulary=first.tokenizer.size,
        facts={
            "stores": [str(Path(path).resolve()) for path in paths],
            "tokens": {split: sum(store.tokens(split) for store in stores) for split in ("train", "validation")},
            "bytes": {split: sum(store.bytes(split) for store in stores) for split in ("train", "validation")},
        },
        keep_with=lambda folder: first.tokenizer.save(folder / "tokenizer.json"),
        preview=lambda objective: _completions(objective, first, recipe),
    )


def _prepare_where_needed(recipe: Recipe, show_progress: bool | None) -> None:
    if recipe.data.mixture is None and _must_prepare(recipe):
        with StageDisplay(enabled=show_progress) as display:
            prepare(recipe, on_progress=display)


def _must_prepare(recipe: Recipe) -> bool:
    """Prepare where sources are given (a finished store of the same inputs is then returned at once)."""
    if recipe.data.sources:
        return True
    path = Path(recipe.store_directory)
    if not (path / "manifest.json").exists():
        raise UserError(
            f"data.sources: the store {path} is not there yet and the recipe names no sources; "
            "give them, for example data.sources='[\"~/corpus/**/*.txt\"]'"
        )
    made = Store.open(path).manifest["inputs"]["data"]
    for name in ("tokenizer", "split"):
        wished = getattr(recipe.data, name).model_dump(mode="json")
        if made[name] != wished:
            raise UserError(
                f"data.{name}: the store {path} was made with {made[name]}, the recipe says {wished}; "
                "prepare another one by another data.store"
            )
    return False


def _completions(objective: Objective, store: Store, recipe: Recipe) -> list[dict[str, Any]]:
    if not recipe.sampling.prompts:
        return []
    found = generate(objective, store.tokenizer, list(recipe.sampling.prompts), recipe.sampling, seed=recipe.seed)
    return [{"prompt": each.prompt, "text": each.text} for each in found]

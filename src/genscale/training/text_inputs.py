"""The inputs of a run that learns from text."""

from __future__ import annotations

from pathlib import Path

from genscale.data.description import TextDescription
from genscale.data.store import Store
from genscale.data.stream import Stream
from genscale.generation.text import generate
from genscale.objectives.objective import Objective
from genscale.recipe.data import TextData
from genscale.recipe.model import TransformerModel
from genscale.recipe.sampling import TextSampling
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import key
from genscale.training.inputs import Inputs


def open_text(recipe: Recipe) -> Inputs:
    """Open the recipe's prepared stores of text."""
    data, model = recipe.data, recipe.model
    assert isinstance(data, TextData)
    assert isinstance(model, TransformerModel)  # the recipe has seen to it
    paths = list(data.mixture or [recipe.store_directory])
    stores = [Store.open(path) for path in paths]
    weights = list(data.mixture.values()) if data.mixture else None
    first = stores[0]
    identity = [store.fingerprint for store in stores] + [str(weight) for weight in weights or []]
    return Inputs(
        described=TextDescription(first.tokenizer.size),
        fingerprint=first.fingerprint if len(stores) == 1 else f"{key(*identity):016x}",
        stream=Stream(stores, weights, "train", model.context, recipe.seed),
        validation=Stream(stores, weights, "validation", model.context, recipe.seed),
        facts={
            "stores": [str(Path(path).resolve()) for path in paths],
            "tokens": {split: sum(store.tokens(split) for store in stores) for split in ("train", "validation")},
            "bytes": {split: sum(store.bytes(split) for store in stores) for split in ("train", "validation")},
        },
        keep_with=lambda folder: first.tokenizer.save(folder / "tokenizer.json"),
        preview=lambda objective: _completions(objective, first, recipe),
    )


def must_prepare(recipe: Recipe) -> bool:
    """Prepare where sources are given (a finished store of the same inputs is then returned at once)."""
    assert isinstance(recipe.data, TextData)
    if recipe.data.mixture is not None:
        return False
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


def _completions(objective: Objective, store: Store, recipe: Recipe) -> list[dict[str, str | bytes]]:
    sampling = recipe.sampling
    assert isinstance(sampling, TextSampling)
    if not sampling.prompts:
        return []
    found = generate(objective, store.tokenizer, list(sampling.prompts), sampling, seed=recipe.seed)
    return [{"prompt": each.prompt, "text": each.text} for each in found]

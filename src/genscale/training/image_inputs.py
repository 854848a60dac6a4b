"""The inputs of a run that learns from images."""

from __future__ import annotations

from pathlib import Path

import torch

from genscale.data.image_captions import caption_ids
from genscale.data.image_store import ImageStore
from genscale.data.image_stream import ImageStream
from genscale.generation.grid import png_bytes
from genscale.generation.images import preview_grid
from genscale.recipe.sampling import ImageSampling
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.training.inputs import Inputs


def open_images(recipe: Recipe) -> Inputs:
    """Open the recipe's prepared store of images."""
    store = ImageStore.open(recipe.store_directory)
    described, sampling = store.described, recipe.sampling
    assert isinstance(sampling, ImageSampling)  # the recipe has seen to it
    captions = None
    if sampling.captions and store.tokenizer is not None:
        captions = torch.from_numpy(caption_ids(store.tokenizer, sampling.captions, described.caption_tokens))
    return Inputs(
        described=described,
        fingerprint=store.fingerprint,
        stream=ImageStream(store, "train", recipe.seed),
        validation=ImageStream(store, "validation", recipe.seed),
        facts={
            "stores": [str(Path(recipe.store_directory).resolve())],
            "images": {split: store.images(split) for split in ("train", "validation")},
            "classes": list(described.classes),
        },
        keep_with=store.keep_with,
        preview=lambda objective: [
            {"image": png_bytes(preview_grid(objective, described, sampling, recipe.seed, captions))}
        ],
    )


def must_prepare(recipe: Recipe) -> bool:
    """Prepare where sources are given (a finished store of the same inputs is then returned at once)."""
    if recipe.data.sources:
        return True
    path = Path(recipe.store_directory)
    if not (path / "manifest.json").exists():
        raise UserError(
            f"data.sources: the store {path} is not there yet and the recipe names no sources; "
            "give them, for example data.sources='[\"~/photos\"]'"
        )
    return False

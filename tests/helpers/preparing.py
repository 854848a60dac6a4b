"""Recipes and stores of text, for the tests of preparation."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.prepare import prepare
from genscale.data.store import Store
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOURCES = sorted(LIBRARY.glob("[a-c]*.py"))


def recipe(folder: Path, *sources: str | dict[str, Any], **data: Any) -> Recipe:
    values = {"tokenizer": {"kind": "bpe", "vocabulary": 600}, "split": {"validation": 0.2}, **data}
    return Recipe.model_validate(
        {"data": {"kind": "text", "sources": sources, "store": str(folder / "store"), **values}}
    )


def documents(store: Store) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row of the documents table with its tokens."""
    tokens = {split: np.concatenate([*store.shards(split), []]).astype(int) for split in ("train", "validation")}
    for row in store.documents().to_pylist():
        yield row, tokens[row["split"]][row["start"] : row["start"] + row["tokens"]].tolist()


def corpus_recipe(tmp_path: Path, corpus: Path, **data: Any) -> Recipe:
    return recipe(tmp_path, {"path": str(corpus), "licence": "PSF-2.0"}, **data)


def refusal(made: Recipe, count: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        prepare(made, workers=count)
    message = str(caught.value)
    assert "\n" not in message
    return message

"""What a run was trained on, as the page tells it: by source and licence, and for images by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genscale.data.image_store import ImageStore
from genscale.data.store import Store
from genscale.recipe.data import TextData
from genscale.reports.table import Table
from genscale.runs.run import Run
from genscale.runtime.errors import UserError

_SOURCES = 30
_CLASSES = 40


@dataclass(frozen=True)
class Corpus:
    """The data of a run; the store may be gone, then only totals are known."""

    rows: list[tuple[str, str]]
    tables: list[Table] = field(default_factory=list)
    remark: str = ""


def corpus(run: Run) -> Corpus:
    """What the run's facts and its stores say of its data."""
    inputs = run.facts.get("inputs") or {}
    stores = inputs.get("stores") or [str(run.store)]
    rows = [("Fingerprint", run.data_fingerprint), *(("Store", path) for path in stores)]
    for name in ("tokens", "bytes", "images"):
        counts = inputs.get(name) or {}
        if counts:
            rows.append((name.capitalize(), _by_split(counts)))
    try:
        more = _texts(run, stores) if isinstance(run.recipe.data, TextData) else _images(stores)
    except (UserError, OSError, ValueError) as error:  # the page must not depend on a store that was moved since
        return Corpus(rows, remark=f"By source it is not known: {error}")
    return Corpus(rows + more.rows, more.tables)


def _texts(run: Run, stores: Iterable[str]) -> Corpus:
    opened = [Store.open(path) for path in stores]
    sources = _grouped(opened, ["source", "licence"], ["size", "tokens"])
    documents = {split: sum(source[split] for source in sources) for split in ("train", "validation")}
    assert isinstance(run.recipe.data, TextData)
    tokenizer = f"{opened[0].manifest['vocabulary']:,} tokens, fingerprint {opened[0].tokenizer.fingerprint}"
    rows = [("Documents", _by_split(documents)), ("Tokenizer", f"{run.recipe.data.tokenizer.kind}, {tokenizer}")]
    sources.sort(key=lambda source: -source["tokens"])
    columns = ("Source", "Licence", "Training documents", "Held out", "Bytes", "Tokens")
    names = ("source", "licence", "train", "validation", "size", "tokens")
    return Corpus(rows, [_table(columns, 2, names, sources, _SOURCES, "smaller sources")])


def _images(stores: Iterable[str]) -> Corpus:
    opened = [ImageStore.open(path) for path in stores]
    described = opened[0].described
    shape = f"{described.channels} x {described.resolution} x {described.resolution}"
    rows = [("Latents of an autoencoder" if described.autoencoder else "Channels, height, width", shape)]
    if described.autoencoder:
        rows.append(("Autoencoder", described.autoencoder))
    if described.caption_vocabulary:
        rows.append(("Captions", f"{described.caption_vocabulary:,} tokens, {described.caption_tokens} an image"))
    sources = _grouped(opened, ["source", "licence"], [])
    sources.sort(key=lambda source: -source["train"])
    columns: tuple[str, ...] = ("Source", "Licence", "Training images", "Held out")
    tables = [_table(columns, 2, ("source", "licence", "train", "validation"), sources, _SOURCES, "smaller sources")]
    if described.classes:
        rows.append(("Classes", f"{len(described.classes):,}"))
        columns = ("Class", "Training images", "Held out")
        classes = _grouped(opened, ["class"], [])
        tables.append(_table(columns, 1, ("class", "train", "validation"), classes, _CLASSES, "more classes"))
    return Corpus(rows, tables)


def _grouped(stores: Iterable[Store | ImageStore], keys: list[str], sums: list[str]) -> list[dict[str, Any]]:
    """Rows of the documents tables with equal keys: how many of each split, and sums, in the order of the keys."""
    import pyarrow.parquet as pq

    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for store in stores:
        # Not the hashes and the paths: a corpus may have 10^8 documents.
        table = pq.read_table(Path(store.path) / "documents.parquet", columns=[*keys, "split", *sums])
        groups = table.group_by([*keys, "split"]).aggregate([([], "count_all"), *((name, "sum") for name in sums)])
        for row in groups.to_pylist():
            key = tuple("not recorded" if row[name] is None or row[name] == "" else row[name] for name in keys)
            empty = {**dict(zip(keys, key, strict=True)), "train": 0, "validation": 0, **dict.fromkeys(sums, 0)}
            group = found.setdefault(key, empty)
            group[row["split"]] += row["count_all"]
            for name in sums:
                group[name] += row[f"{name}_sum"]
    return [found[key] for key in sorted(found)]


def _table(
    columns: tuple[str, ...], words: int, names: tuple[str, ...], rows: list[dict[str, Any]], most: int, rest: str
) -> Table:
    written = [
        tuple(str(row[name]) if place < words else f"{row[name]:,}" for place, name in enumerate(names))
        for row in rows[:most]
    ]
    return Table(columns, words, written, f"and {len(rows) - most:,} {rest}" if len(rows) > most else "")


def _by_split(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())

"""``genscale data``: prepare a store, report on one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from genscale.cli.groups import Commands
from genscale.cli.options import json_option

if TYPE_CHECKING:
    from genscale.data.image_store import ImageStore
    from genscale.data.store import Store


@click.group("data", cls=Commands)
def data() -> None:
    """Prepare stores of training data and report on them."""


@data.command("prepare")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; by default one for each core.")
@json_option
def prepare(recipe: str, overrides: tuple[str, ...], workers: int | None, as_json: bool) -> None:
    """Read, tokenise or resize, and store the training data that a recipe names.

    OVERRIDES change the recipe, for example data.sources='["~/corpus/**/*.txt"]'. Called again after an interruption
    it goes on; called again afterwards it returns the finished store.
    """
    from genscale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)  # before the heavy imports, so that a mistake is told at once

    from genscale.data.prepare import prepare
    from genscale.runtime.progress import StageDisplay

    with StageDisplay(enabled=False if as_json else None) as display:
        store = prepare(loaded, workers=workers, on_progress=display)
    _print_summary(store, as_json)


@data.command("report")
@click.argument("store")
@click.option("--verify", is_flag=True, help="Read every file and compare it with its checksum.")
@json_option
def report(store: str, verify: bool, as_json: bool) -> None:
    """What is in a store: documents and tokens, or images by class, with bytes and licences by source."""
    from genscale.data.image_store import ImageStore
    from genscale.data.manifest import kind_of
    from genscale.data.store import Store

    opened = ImageStore.open(store) if kind_of(store) == ImageStore.kind else Store.open(store)
    if verify:
        opened.verify()
    _print_summary(opened, as_json)


def _print_summary(store: Store | ImageStore, as_json: bool) -> None:
    from genscale.data.image_store import ImageStore

    if isinstance(store, ImageStore):
        found, lines = _image_summary(store), _image_lines
    else:
        found, lines = _text_summary(store), _text_lines
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(lines(found)))


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first and the last column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        middle = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *middle, row[-1]]).rstrip())
    return lines


def _text_lines(found: dict[str, Any]) -> list[str]:
    rows = [["", "documents", "tokens", "bytes", "licence"]]
    for name, amounts in {**found["splits"], **found["sources"]}.items():
        licences = ", ".join(amounts.get("licences", []))
        rows.append([name, *(f"{amounts[column]:,}" for column in ("documents", "tokens", "bytes")), licences])
    head = f"{found['store']}  fingerprint {found['fingerprint']}  vocabulary {found['vocabulary']:,}"
    lines = [head, "", *_table(rows)]
    for source in found["faults"]:
        counts = ", ".join(f"{source[name]:,} {told}" for name, told in _FAULTS.items() if source[name])
        lines += ["", f"{source['source']}: {counts}", *(f"  {note}" for note in source["notes"])]
    return lines


def _image_lines(found: dict[str, Any]) -> list[str]:
    height, width, channels = found["shape"]
    kind = "pixels" if found["dtype"] == "uint8" else "latents"
    head = f"{found['store']}  fingerprint {found['fingerprint']}  {height}x{width}x{channels} {kind}"
    rows = [["", "images", "bytes", "licence"]]
    for name, amounts in {**found["splits"], **found["sources"]}.items():
        rows.append([name, f"{amounts['images']:,}", f"{amounts['bytes']:,}", ", ".join(amounts.get("licences", []))])
    lines = [head, "", *_table(rows)]
    if found["classes"]:
        rows = [["class", *found["splits"], ""]]
        for name, counts in list(found["classes"].items())[:_CLASSES]:
            rows.append([name, *(f"{counts[split]:,}" for split in found["splits"]), ""])
        lines += ["", *_table(rows)]
        if len(found["classes"]) > _CLASSES:
            lines.append(f"... and {len(found['classes']) - _CLASSES:,} more classes (--json lists them all)")
    if found["duplicates"]:
        lines += ["", f"{found['duplicates']:,} images have the pixels of another; such images are in one split"]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    for source in found["faults"]:
        left_out = ", ".join(f"{count:,} {ending}" for ending, count in source["left_out"].items())
        told = [f"{source['bad']:,} bad images left out"] if source["bad"] else []
        told += [f"files that hold no images: {left_out}"] if left_out else []
        lines += ["", f"{source['source']}: {'; '.join(told)}", *(f"  {note}" for note in source["notes"])]
    return lines


_CLASSES = 40
"""Classes that are printed; more are in the JSON."""

_FAULTS = {
    "undecodable": "undecodable documents",
    "dropped": "of them dropped",
    "damaged": "damaged parts left out",
    "empty": "empty documents left out",
}
"""What the manifest counts for each source of text, in words."""


def _totals(table: Any, column: str, counted: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Sums over the documents table by the values of a column: ``counted`` is {name: (column, aggregation)}."""
    grouped = table.group_by(column).aggregate(list(counted.values()))
    return {
        str(row[column]): {name: row[f"{of}_{how}"] for name, (of, how) in counted.items()}
        for row in sorted(grouped.to_pylist(), key=lambda row: str(row[column]))
    }


def _sources(table: Any, counted: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The totals of each source, with its licences."""
    sources = _totals(table, "source", counted)
    pairs = table.group_by(["source", "licence"]).aggregate([]).to_pylist()
    for source, amounts in sources.items():
        licences = {row["licence"] for row in pairs if row["source"] == source}
        amounts["licences"] = sorted(licence or "not given" for licence in licences)
    return sources


def _text_summary(store: Store) -> dict[str, Any]:
    """Documents, tokens and UTF-8 bytes by split and by source; and what was wrong with the sources."""
    table = store.documents()
    # A document that is cut by `split.by: tail` has two rows and is one document.
    counted = {"documents": ("id", "count_distinct"), "tokens": ("tokens", "sum"), "bytes": ("size", "sum")}
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "vocabulary": store.tokenizer.size,
        "splits": _totals(table, "split", counted),
        "sources": _sources(table, counted),
        "faults": [
            {"source": source["path"], **{name: source[name] for name in (*_FAULTS, "notes")}}
            for source in store.manifest.get("sources", [])
            if any(source[name] for name in _FAULTS)
        ],
    }


def _image_summary(store: ImageStore) -> dict[str, Any]:
    """Images and bytes by split, by source and by class; copies, warnings, and what was wrong with the sources."""
    import pyarrow.compute as pc

    table = store.documents()
    counted = {"images": ("id", "count"), "bytes": ("size", "sum")}
    splits = _totals(table, "split", counted)
    classes = {name: dict.fromkeys(splits, 0) for name in store.described.classes}
    for row in table.group_by(["class", "split"]).aggregate([("id", "count")]).to_pylist():
        if row["class"] is not None:
            classes[row["class"]][row["split"]] = row["id_count"]
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "shape": list(store.shape),
        "dtype": store.dtype.name,
        "splits": splits,
        "sources": _sources(table, counted),
        "classes": classes,
        "caption_vocabulary": store.described.caption_vocabulary,
        "duplicates": table.num_rows - pc.count_distinct(table["pixels"]).as_py(),
        "warnings": store.manifest.get("warnings", []),
        "faults": [
            {"source": source["path"], **{name: source[name] for name in ("bad", "left_out", "notes")}}
            for source in store.manifest.get("sources", [])
            if source["bad"] or source["left_out"]
        ],
    }

"""``genscale data``: prepare a store, report on one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from genscale.cli.groups import Commands
from genscale.cli.options import json_option

if TYPE_CHECKING:
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
    """Read, tokenise and store the training data that a recipe names.

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
    """What is in a store: documents, tokens, bytes and licences by source."""
    from genscale.data.store import Store

    opened = Store.open(store)
    if verify:
        opened.verify()
    _print_summary(opened, as_json)


def _print_summary(store: Store, as_json: bool) -> None:
    found = _summary(store)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    rows = [["", "documents", "tokens", "bytes", "licence"]]
    for name, amounts in {**found["splits"], **found["sources"]}.items():
        licences = ", ".join(amounts.get("licences", []))
        rows.append([name, *(f"{amounts[column]:,}" for column in ("documents", "tokens", "bytes")), licences])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    click.echo(f"{store.path}  fingerprint {store.fingerprint}  vocabulary {found['vocabulary']:,}\n")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3)), row[4]]
        click.echo("  ".join(cells).rstrip())
    for source in found["faults"]:
        counts = ", ".join(f"{source[name]:,} {told}" for name, told in _FAULTS.items() if source[name])
        click.echo(f"\n{source['source']}: {counts}")
        for note in source["notes"]:
            click.echo(f"  {note}")


_FAULTS = {
    "undecodable": "undecodable documents",
    "dropped": "of them dropped",
    "damaged": "damaged parts left out",
    "empty": "empty documents left out",
}
"""What the manifest counts for each source, in words."""


def _summary(store: Store) -> dict[str, Any]:
    """Documents, tokens and UTF-8 bytes by split and by source; and what was wrong with the sources."""
    table = store.documents()

    def totals(column: str) -> dict[str, dict[str, Any]]:
        # A document that is cut by `split.by: tail` has two rows and is one document.
        grouped = table.group_by(column).aggregate([("id", "count_distinct"), ("tokens", "sum"), ("size", "sum")])
        return {
            str(row[column]): {
                "documents": row["id_count_distinct"],
                "tokens": row["tokens_sum"],
                "bytes": row["size_sum"],
            }
            for row in sorted(grouped.to_pylist(), key=lambda row: str(row[column]))
        }

    sources = totals("source")
    pairs = table.group_by(["source", "licence"]).aggregate([]).to_pylist()
    for source, amounts in sources.items():
        licences = {row["licence"] for row in pairs if row["source"] == source}
        amounts["licences"] = sorted(licence or "not given" for licence in licences)
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "vocabulary": store.tokenizer.size,
        "splits": totals("split"),
        "sources": sources,
        "faults": [
            {"source": source["path"], **{name: source[name] for name in (*_FAULTS, "notes")}}
            for source in store.manifest.get("sources", [])
            if any(source[name] for name in _FAULTS)
        ],
    }

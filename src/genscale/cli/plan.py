"""``genscale plan``."""

from __future__ import annotations

import json

import click

from genscale.cli.options import json_option


@click.command("plan")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--simulate", "ranks", type=click.IntRange(min=1), required=True, help="Lay it out on so many processes.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Of the process that is shown.")
@json_option
def plan(recipe: str, overrides: tuple[str, ...], ranks: int, rank: int, as_json: bool) -> None:
    """What each process of a layout would hold, without the processes.

    RECIPE is a file, or the name of a recipe that comes with genscale. OVERRIDES change it, such as layout.shard=64.
    The model is built and split by the code that trains, without data, and what comes to lie on the process is counted.
    """
    from genscale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)

    from genscale.planning.simulate import simulate

    held = simulate(loaded, ranks, rank)
    if as_json:
        click.echo(json.dumps(held.as_json))
        return
    layout = " x ".join(f"{axis} {size}" for axis, size in held.layout.items()) or "one process"
    click.echo(f"{held.parameters:,} parameters on {held.ranks:,} processes ({layout}), process {held.rank}:")
    for name, size in (
        ("weights", held.parameter_bytes),
        ("gradients", held.gradient_bytes),
        ("optimizer", held.optimizer_bytes),
    ):
        click.echo(f"  {name:10} {size / 2**30:10.3f} GiB")
    total = held.parameter_bytes + held.gradient_bytes + held.optimizer_bytes
    click.echo(f"  {'together':10} {total / 2**30:10.3f} GiB, beside activations")

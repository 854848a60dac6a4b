"""``genscale verify``."""

from __future__ import annotations

import json

import click

from genscale.cli.options import json_option


@click.command("verify")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--layout", required=True, help="For example tensor=2,shard=2; axes that are not named have one rank.")
@click.option("--against", default="single", show_default=True, help="One process, or another layout.")
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="How many to compare.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    show_default=True,
    help="Of a difference, as a part of the tensor's largest absolute value.",
)
@json_option
@click.pass_context
def verify(
    context: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    layout: str,
    against: str,
    steps: int,
    tolerance: float,
    as_json: bool,
) -> None:
    """Run the same steps on two layouts, and find the first tensor that differs.

    RECIPE is a file, or the name of a recipe that comes with genscale; OVERRIDES change it, for example
    training.batch='8 samples'. The processes of both layouts run on this machine, in fp32 unless layout.precision is
    among the overrides. Exit code 1 where a tensor differs.
    """
    from genscale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)  # before the heavy imports, so that a mistake is told at once

    from genscale.planning.verify import laid_out, verify

    said = {override.partition("=")[0].strip() for override in overrides}
    keeps = [name for name in ("precision", "compile") if f"layout.{name}" in said]
    one, other = (
        laid_out(loaded, text, option, keeps) for option, text in (("--layout", layout), ("--against", against))
    )
    comparison = verify(one, other, steps=steps, tolerance=tolerance, show_progress=False if as_json else None)
    click.echo(json.dumps(comparison.as_json) if as_json else str(comparison))
    if not comparison.agrees:
        context.exit(1)

"""``genscale recipe``: list, show, schema."""

from __future__ import annotations

import json

import click

from genscale.cli.groups import Commands
from genscale.cli.options import json_option


@click.group("recipe", cls=Commands)
def recipe() -> None:
    """List, show and describe recipes."""


@recipe.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """The recipes that come with genscale."""
    from genscale.recipe.load import load_recipe
    from genscale.recipe.shipped import display_name, shipped_recipes

    rows = [(name, load_recipe(name).description, file) for name, file in shipped_recipes().items()]
    if as_json:
        entries = [{"name": name, "description": about, "path": str(file)} for name, about, file in rows]
        click.echo(json.dumps(entries, indent=2))
        return
    width = max(len(display_name(file)) for _, _, file in rows)
    for _, about, file in rows:
        click.echo(f"{display_name(file):<{width}}  {about}")


@recipe.command("show")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@json_option
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """The resolved recipe: what it extends, OVERRIDES and every default filled in.

    RECIPE is a file, or the name of a recipe that comes with genscale.
    """
    from genscale.recipe.load import load_recipe, recipe_to_yaml

    loaded = load_recipe(recipe, overrides)
    if as_json:
        click.echo(json.dumps(loaded.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        click.echo(recipe_to_yaml(loaded), nl=False)


@recipe.command("schema")
def schema() -> None:
    """The JSON schema of recipe files, by which editors check and complete them."""
    from genscale.recipe.json_schema import recipe_json_schema

    click.echo(json.dumps(recipe_json_schema(), indent=2))

"""The JSON schema of recipe files, for editors."""

from __future__ import annotations

from typing import Any

from genscale.recipe.schema import Recipe


def recipe_json_schema() -> dict[str, Any]:
    """What a recipe file may hold: the recipe's own keys, and ``extends``."""
    schema = _any_of(Recipe.model_json_schema())
    extends = {"type": "string", "description": "A recipe, by path or shipped name, that this one builds on."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "genscale recipe"
    return schema


def _any_of(schema: Any) -> Any:
    """``anyOf`` for ``oneOf``: without its ``kind``, which a file may leave to the default, a part fits several."""
    if isinstance(schema, list):
        return [_any_of(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    # A property may have the name "discriminator" too; the keyword stands beside "oneOf".
    return {
        "anyOf" if key == "oneOf" else key: _any_of(value)
        for key, value in schema.items()
        if key != "discriminator" or "oneOf" not in schema
    }

"""From YAML files and ``key.path=value`` overrides to a typed :class:`Recipe`, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from genscale.recipe.base import Part
from genscale.recipe.dialect import KeyPath, read_yaml, write_yaml
from genscale.recipe.mistakes import one_line, part_for
from genscale.recipe.schema import Recipe
from genscale.recipe.shipped import display_name, find_recipe
from genscale.runtime.errors import UserError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, the recipes that it extends, and overrides such as ``training.batch='32 samples'``.

    ``path`` is a file or the name of a shipped recipe. A recipe without a ``name`` is called after its file. A mapping
    in a recipe is merged into that of the recipe it extends, unless its ``kind`` is another; everything else replaces.
    Raises UserError that says which file and line, or which override, is wrong, and what was expected.
    """
    file = find_recipe(path)
    layer = _layer(file, ())
    _apply(layer, overrides)
    return _validated(layer.values, lambda key: layer.origin(key, display_name(file)))


def recipe_from_mapping(mapping: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data, as YAML or JSON would hold it; ``where`` begins the message of a UserError."""
    return _validated(_filled(dict(mapping), Recipe), lambda key: where)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole resolved recipe; loading it gives an equal one."""
    return write_yaml(recipe.model_dump(mode="json"))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """One line for each value that is not the same: ``training.batch: 64 samples -> 32 samples``."""
    before, after = _leaves(a.model_dump(mode="json")), _leaves(b.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


@dataclass
class _Layer:
    """A recipe's data so far, and where each key was written."""

    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, key: KeyPath, otherwise: str) -> str:
        """Where a key, or the nearest part around it, was written."""
        return next((self.origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.origins), otherwise)

    def overlay(self, other: _Layer) -> None:
        """Merge another layer over this one."""
        lists = {key[:-1] for key in other.origins if isinstance(key[-1], int)}
        kept = {key: at for key, at in self.origins.items() if not any(key[:n] in lists for n in range(len(key)))}
        self.origins = kept | other.origins
        self.values = _filled(_merged(self.values, other.values), Recipe)


def _layer(file: Path, extended_by: tuple[Path, ...]) -> _Layer:
    """A recipe file and the chain that it extends, merged."""
    name = display_name(file)
    for link in extended_by:
        if link.samefile(file):
            names = " extends ".join(map(display_name, (*extended_by, file)))
            raise UserError(f"recipes extend each other in a circle: {names}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    values, lines = read_yaml(text, name)
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected keys such as 'model:' and 'training:', found {_content(values)}")
    origins = {key: f"{name}, line {line}" for key, line in lines.items()}
    if not extended_by:
        values.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "run")
    if "extends" not in values:
        return _Layer(_filled(values, Recipe), origins)
    parent = values.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"{origins[('extends',)]}: extends: expected one recipe's path or name")
    try:
        parent_file = find_recipe(parent, file.parent)
    except UserError as error:
        raise UserError(f"{origins[('extends',)]}: extends: {error}") from None
    below = _layer(parent_file, (*extended_by, file))
    below.overlay(_Layer(values, origins))
    return below


def _content(values: Any) -> str:
    return "nothing" if values is None else "a list" if isinstance(values, list) else repr(values)


def _apply(layer: _Layer, overrides: Sequence[str]) -> None:
    """Overrides are one layer, so that their order does not matter; those that go into a list come after it."""
    tree, into_lists = _Layer({}), []
    for override in overrides:
        key, equals, text = override.partition("=")
        steps, where = key.strip().split("."), f"override '{override}'"
        if not equals or not all(steps):
            raise UserError(f"{where}: expected key.path=value, such as training.batch='32 samples'")
        value, lines = read_yaml(text, where)
        if any(step.isdigit() for step in steps):
            into_lists.append((steps, value, where))
            continue
        here = tree.values
        for position, step in enumerate(steps[:-1]):
            if not isinstance(_at(layer.values, steps[: position + 1]), Mapping):
                tree.origins[tuple(steps[: position + 1])] = where
            if not isinstance(here.get(step), dict):
                here[step] = {}
            here = here[step]
        here[steps[-1]] = value
        tree.origins[tuple(steps)] = where
        tree.origins.update({(*steps, *inner): where for inner in lines})
    if "extends" in tree.values:
        raise UserError(f"{tree.origins[('extends',)]}: extends stands in a recipe file, not in an override")
    layer.overlay(tree)
    for steps, value, where in into_lists:
        layer.origins[_set_in_list(layer.values, steps, value, where)] = where


def _at(values: Any, steps: Sequence[str]) -> Any:
    """The value at a path, None when there is none."""
    for step in steps:
        values = values.get(step) if isinstance(values, Mapping) else None
    return values


def _set_in_list(values: dict[str, Any], steps: list[str], value: Any, where: str) -> KeyPath:
    """Set ``data.sources.0.path`` and the like; the index after the last appends."""
    here: Any = values
    path: KeyPath = ()
    for position, step in enumerate(steps):
        last, dotted = position + 1 == len(steps), ".".join(map(str, path))
        if isinstance(here, list):
            if not step.isdigit() or int(step) > len(here):
                raise UserError(f"{where}: {dotted} is a list of {len(here)}; expected an index up to {len(here)}")
            index: Any = int(step)
            if index == len(here):
                here.append({})
            if isinstance(here[index], str) and not last:
                here[index] = {"path": here[index]}  # the lists of parts are lists of sources
        elif isinstance(here, dict):
            index = step
            following = "" if last else steps[position + 1]
            if not last and here.get(step) is None:
                here[step] = [] if following.isdigit() else {}
        else:
            raise UserError(f"{where}: {dotted} is {here!r}, which has no '{step}'")
        path = (*path, index)
        if last:
            here[index] = value
        else:
            here = here[index]
    return path


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged, unless the kind changes; everything else is replaced."""
    if "kind" in over and over["kind"] != base.get("kind", over["kind"]):
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        old = base.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _filled(values: dict[str, Any], part: type[Part]) -> dict[str, Any]:
    """The values with each mapping completed from its field's default, where that is of the same kind.

    So ``optimizer: {learning_rate: 0.01}`` needs no ``kind``, and a few keys of ``rest`` keep the others as they are.
    """
    result = dict(values)
    for name, described in part.model_fields.items():
        value = result.get(name)
        if not isinstance(value, dict) or (chosen := part_for(described, value)) is None:
            continue
        if isinstance(described.default, chosen):
            value = _merged(described.default.model_dump(mode="json"), value)
        elif described.default is None and "kind" in chosen.model_fields:
            value = {"kind": chosen.model_fields["kind"].default, **value}
        result[name] = _filled(value, chosen)
    return result


def _validated(values: dict[str, Any], origin: Callable[[KeyPath], str]) -> Recipe:
    try:
        return Recipe.model_validate(_frozen(values), strict=True)
    except ValidationError as error:
        raise UserError(one_line(error, Recipe, values, origin)) from None


def _frozen(value: Any) -> Any:
    """Lists as tuples, which is what the recipe holds: strict validation turns nothing into anything else."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(_frozen(entry) for entry in value) if isinstance(value, (list, tuple)) else value


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """Dotted keys to values as text; lists of plain values are one value."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        entries = dict(enumerate(value)).items()
    else:
        return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    return {
        leaf: text
        for key, entry in entries
        for leaf, text in _leaves(entry, f"{path}.{key}" if path else str(key)).items()
    }

"""From pydantic's errors to one clear line: where it was written, which key, what was expected, what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from genscale.recipe.base import Part
from genscale.recipe.dialect import KeyPath
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import nearest

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def parts_in(annotation: Any) -> list[type[Part]]:
    """The recipe parts that a field may hold, in the order of its annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts_in(argument)]


def part_for(field: FieldInfo, value: Mapping[str, Any]) -> type[Part] | None:
    """The part that a mapping given for a field is to become: by its ``kind``, that of the field's default, or, where
    there is none by default, the first."""
    parts = parts_in(field.annotation)
    if len(parts) < 2:
        return parts[0] if parts else None
    kind = value.get("kind", getattr(field.default, "kind", parts[0].model_fields["kind"].default))
    return next((part for part in parts if part.model_fields["kind"].default == kind), None)


def one_line(error: ValidationError, part: type[Part], values: Any, origin: Callable[[KeyPath], str]) -> str:
    """The first of the mistakes, and how many more there are.

    ``part`` is what the ``values`` were to become; ``origin`` says where a key was written.
    """
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(_key_path(detail, values), []).append(detail)
    # A misspelt key that was required is told once, as misspelt.
    misspelt = [path[:-1] for path, details in found.items() if details[0]["type"] == "extra_forbidden"]
    found = {
        path: details for path, details in found.items() if details[0]["type"] != "missing" or path[:-1] not in misspelt
    }
    path, details = min(found.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    where, text = _told(path, details, part, values)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{origin(where)}: {text}{more}"


def _key_path(detail: ErrorDetails, values: Any) -> KeyPath:
    """pydantic's location without the names that it adds for the branches of unions."""
    path: list[str | int] = []
    for position, step in enumerate(detail["loc"]):
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            if detail["type"] != "missing" or position + 1 < len(detail["loc"]):
                continue
        path.append(step)
    return tuple(path)


def _told(path: KeyPath, details: list[ErrorDetails], part: type[Part], values: Any) -> tuple[KeyPath, str]:
    """The key to point at, and what to say of it."""
    detail = details[0]
    key = ".".join(map(str, path))
    prefix = f"{key}: " if key else ""
    if detail["type"] == "extra_forbidden":
        return path, f"{key}: unknown key{_suggestion(path, part, values)}"
    if detail["type"] == "missing":
        return path, f"{key}: missing"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return _first_key_in(message, path, _value_at(path, values)), f"{prefix}{message}"
    given = detail["input"]
    if detail["type"] == "union_tag_invalid":
        path, prefix, given = (*path, "kind"), f"{key}.kind: ", given["kind"]
    expected = " or ".join(_expected(one) for one in details)
    hint = nearest(given, re.findall(r"'([^']*)'", expected)) if isinstance(given, str) else ""
    return path, f"{prefix}expected {expected}, found {_shown(given)}{hint}"


def _expected(detail: ErrorDetails) -> str:
    template = _EXPECTED.get(detail["type"])
    expected = template.format(**detail.get("ctx", {})) if template else detail["msg"]
    return re.sub(r", ('[^']*')$", r" or \1", expected)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value_at(path: KeyPath, values: Any) -> Any:
    for step in path:
        values = values[step]
    return values


def _first_key_in(message: str, path: KeyPath, values: Any) -> KeyPath:
    """The first key of the part at ``path`` that a message names, so that its own line can be told."""
    for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", message):
        steps, here = word.split("."), values
        for step in steps:
            here = here.get(step) if isinstance(here, Mapping) else None
        if here is not None:
            return (*path, *steps)
    return path


def _suggestion(path: KeyPath, part: type[Part], values: Any) -> str:
    """What an unknown key was perhaps meant to be: the same key elsewhere, one like it here, or the keys there are."""
    *parents, key = path
    here: type[Part] | None = part
    for step in parents:
        values = values[step]
        if isinstance(step, str) and here is not None and isinstance(values, Mapping):
            here = part_for(here.model_fields[step], values)
        elif isinstance(step, str) and here is not None:  # a list of parts; the next step is an index into it
            here = next(iter(parts_in(here.model_fields[step].annotation)), None)
    assert here is not None  # pydantic knew the part, or the key could not be unknown
    known = [*here.model_fields, *(["extends"] if here is Recipe else [])]
    elsewhere = [place for place in _places(part) if place[-1] == key]
    if any(place[:-1] == tuple(step for step in parents if isinstance(step, str)) for place in elsewhere):
        return f" of kind '{values['kind']}'; it belongs to another kind"
    if elsewhere:
        return f", did you mean '{'.'.join(elsewhere[0])}'?"
    return nearest(str(key), known) or f"; the keys here are {', '.join(known)}"


def _places(part: type[Part]) -> list[tuple[str, ...]]:
    """Every key that a part may have, with its parents, the shallowest first."""
    places: list[tuple[str, ...]] = []
    for name, field in part.model_fields.items():
        inner = [place for held in parts_in(field.annotation) for place in _places(held)]
        places += [(name,), *((name, *place) for place in inner)]
    return sorted(places, key=len)

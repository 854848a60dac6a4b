"""The YAML of recipes: plain data, with the line of every key, and without YAML 1.1's surprises.

``1e-3`` is a number here and ``1e8`` a whole one; ``no``, ``on`` and ``2024-01-01`` are text; a key given twice is an
error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from genscale.runtime.errors import UserError

KeyPath = tuple[str | int, ...]

_PLAIN = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """Safe, and reading plain words by the patterns above alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes what the patterns above would read as something else than text."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    value: float = loader.construct_yaml_float(node)
    return int(value) if "." not in node.value and value.is_integer() else value


_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """The data in a YAML text, and the line of each key and list entry in it.

    Raises UserError, with ``where`` and the line, when it is not YAML or gives a key twice.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _data(loader, node, (), lines, where)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{where}: a YAML alias contains itself") from None


def _data(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], where: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            lines[*path, index] = entry.start_mark.line + 1
        return [_data(loader, entry, (*path, index), lines, where) for index, entry in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"{where}, line {line}: a key must be a word")
        if key in data:
            dotted = ".".join(map(str, (*path, key)))
            raise UserError(f"{where}, line {line}: {dotted}: given twice, first in line {lines[*path, key]}")
        lines[*path, key] = line
        data[key] = _data(loader, value_node, (*path, key), lines, where)
    return data


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _text)


def write_yaml(data: Any) -> str:
    """YAML that :func:`read_yaml` reads back as equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)

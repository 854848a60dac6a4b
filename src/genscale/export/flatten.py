"""Code of genscale as one file that needs no genscale: for what is taken elsewhere with a model's weights.

A module and all that it imports from the package are put one after the other, as they are written, comments included.
What only annotations name of the package is left out, so that a network does not bring the recipe along; a part of the
recipe that a network makes for itself becomes a plain class of the same values.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent, indent

from genscale.recipe.base import Part


@dataclass(frozen=True)
class _Piece:
    """One module's part of the file."""

    module: str
    text: str
    outside: tuple[str, ...]
    """Its imports from other packages, as they are written."""
    names: frozenset[str]
    """What it defines at the top."""


def flatten(module: str, docstring: str) -> str:
    """The source of a module and of all that it needs of the package, as one.

    Raises:
        ValueError: two modules define the same public name, or one is imported in a way that is not followed.
    """
    pieces: dict[str, _Piece] = {}
    _collect(module, pieces, set())
    texts, owners = [], dict[str, str]()
    for piece in pieces.values():
        text = piece.text
        for name in sorted(piece.names):
            owner = owners.setdefault(name, piece.module)
            if owner == piece.module:
                continue
            if not name.startswith("_"):
                raise ValueError(f"{owner} and {piece.module} both define {name}")
            text = re.sub(rf"(?<![\w.]){name}\b", f"{name}_of_{piece.module.rpartition('.')[2]}", text)
        texts.append(f"# {piece.module}\n\n{_tidy(text)}\n")
    outside = sorted({line for piece in pieces.values() for line in piece.outside})
    head = f'"""{docstring}"""\n\nfrom __future__ import annotations\n'
    return "\n\n".join([head, "\n".join(outside) + "\n", *texts])


def _tidy(text: str) -> str:
    """Without the gaps that imports leave, and without words to the type checker."""
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"^# mypy:.*\n", "", text, flags=re.MULTILINE)).strip()


def _collect(module: str, pieces: dict[str, _Piece], under_way: set[str]) -> None:
    """Add what a module needs, then the module."""
    if module in pieces or module in under_way:
        return
    under_way.add(module)
    source = _source(module)
    tree = ast.parse(source)
    used = _used_at_run_time(tree)
    dropped: list[ast.stmt] = [node for node in tree.body if _is_for_type_checking(node)]
    outside: list[str] = []
    if tree.body and isinstance(tree.body[0], ast.Expr):
        dropped.append(tree.body[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _within_package(node.module):
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{module}, line {node.lineno}: an import under another name is not followed")
            dropped.append(node)
            for alias in node.names:
                if alias.name in used:
                    _follow(_home(str(node.module), alias.name), alias.name, pieces, under_way)
        elif isinstance(node, ast.Import | ast.ImportFrom) and node in tree.body:
            dropped.append(node)
            outside += _imports(node)
    lines = source.splitlines()
    for number in sorted({line for node in dropped for line in _lines(node)}, reverse=True):
        del lines[number - 1]
    pieces[module] = _Piece(module, "\n".join(lines), tuple(outside), frozenset(_defined(tree)))


def _follow(home: str, name: str, pieces: dict[str, _Piece], under_way: set[str]) -> None:
    found = getattr(import_module(home), name)
    if isinstance(found, type) and issubclass(found, Part):
        pieces[f"{home}.{name}"] = _Piece(home, _plain(found), (), frozenset({name}))
    else:
        _collect(home, pieces, under_way)


def _plain(part: type[Part]) -> str:
    """A part of the recipe as a class without checks: its defaults, and what it computes."""
    defaults = {name: field.default for name, field in part.model_fields.items() if not field.is_required()}
    unwritten = [name for name, value in defaults.items() if ast.literal_eval(repr(value)) != value]
    assert not unwritten, f"{part.__name__}: {unwritten}"
    properties = [value.fget for value in vars(part).values() if isinstance(value, property)]
    return "\n".join(
        [
            f"class {part.__name__}:",
            f'    """{(part.__doc__ or "").strip()}"""\n',
            "    def __init__(self, **values):",
            f"        self.__dict__.update({defaults!r} | values)",
            *("\n" + indent(dedent(inspect.getsource(each)), "    ").rstrip() for each in properties if each),
        ]
    )


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _home(module: str, name: str) -> str:
    """The module that defines a name, where ``module`` only passes it on."""
    for node in ast.parse(_source(module)).body:
        passes_on = isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names)
        if passes_on and isinstance(node, ast.ImportFrom) and _within_package(node.module):
            return _home(str(node.module), name)
    return module


def _within_package(module: str | None) -> bool:
    return (module or "").split(".")[0] == "genscale"


def _imports(node: ast.Import | ast.ImportFrom) -> list[str]:
    """One line for each name of an import; also where annotations alone use it, for those who look at signatures."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return []
    written = [alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names]
    before = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
    return [f"{before} {name}" for name in written]


def _is_for_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module binds at the top, imports aside."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _used_at_run_time(tree: ast.Module) -> set[str]:
    """Names that are read anywhere but in annotations, which are never evaluated."""
    annotations: set[int] = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if isinstance(annotation, ast.expr):
                annotations |= {id(each) for each in ast.walk(annotation)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in annotations}

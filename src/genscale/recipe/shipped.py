"""The recipes that come with genscale, and how a recipe is found by name or path."""

from __future__ import annotations

from pathlib import Path

from genscale.runtime.errors import UserError, nearest

FOLDER = Path(__file__).parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name to file, by objective and then name: ``{"tiny": .../recipes/text/tiny.yaml, ...}``."""
    return {file.stem: file for file in sorted(FOLDER.glob("*/*.yaml"))}


def display_name(file: Path) -> str:
    """The file as people would name it: a shipped one as ``recipes/text/tiny.yaml``."""
    return f"recipes/{file.relative_to(FOLDER)}" if file.is_relative_to(FOLDER) else str(file)


def find_recipe(name: str | Path, folder: Path | None = None) -> Path:
    """The file of a recipe given as a path (relative to ``folder``, by default the current one) or a shipped name.

    A file of the user's comes first; ``tiny`` and ``recipes/text/tiny.yaml`` otherwise name the shipped recipe.
    Raises UserError with the nearest name when there is none.
    """
    given = Path(name).expanduser()
    file = (folder or Path()) / given
    if file.is_file():
        return file
    if file.is_dir() and len(given.parts) > 1:
        raise UserError(f"{name}: is a folder, not a recipe file")
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if given.parts[:1] == ("recipes",) and (built_in := FOLDER.joinpath(*given.parts[1:])).is_file():
        return built_in
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        beside = [str(other.relative_to(folder or Path())) for other in sorted(file.parent.glob("*.y*ml"))]
        known = [*beside, *(display_name(path) for path in shipped.values())]
        hint = nearest(given.stem if given.stem in shipped else str(name), [*shipped, *known])
        raise UserError(f"{name}: no such recipe file{hint}")
    hint = nearest(str(name), list(shipped)) or f"; shipped recipes: {', '.join(shipped)}"
    raise UserError(f"{name}: no such recipe{hint}")

"""A table of the page: words to the left, numbers to the right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Columns and rows as they are written."""

    columns: tuple[str, ...]
    words: int
    """How many columns, from the left, hold words; the others are numbers and end in line."""
    rows: list[tuple[str, ...]]
    more: str = ""
    """What was left out."""

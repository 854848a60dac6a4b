"""Samples: an image as its source holds it, with what the source says of it; and what could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from genscale.data.image_sources import ImageFile
from genscale.runtime.errors import UserError, nearest

NOTES = 20
"""So many bad images are named in the manifest for each source; all are counted."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or a range of it: members (archives), row groups (parquet), rows (hf, digits), images (idx)."""

    file: ImageFile
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a source."""

    path: str
    """Within the source: of the file, and of the member for an archive."""
    position: int
    """Number of the record in its file, from 0."""
    content: bytes | np.ndarray
    """The bytes of an image file, or (height, width[, channels]) values."""
    label: str | None
    """Name of the class, if it is known."""
    caption: str | None


@dataclass
class Report:
    """What became of a source's images."""

    bad: int = 0
    """Images that could not be read, and were left out."""
    unlabelled: int = 0
    """Images without a class."""
    captions: int = 0
    """Images with a caption."""
    notes: list[str] = field(default_factory=list)
    """Names of bad images, the first few."""
    images: dict[str, int] = field(default_factory=dict)
    """By split."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the source's own order, where it declares one."""

    def add(self, other: dict[str, Any]) -> None:
        """Add another report, as :meth:`to_dict` gives it."""
        for name in ("bad", "unlabelled", "captions"):
            setattr(self, name, getattr(self, name) + other[name])
        self.notes = (self.notes + other["notes"])[:NOTES]
        for split, count in other["images"].items():
            self.images[split] = self.images.get(split, 0) + count
        self.declare(other["classes"])

    def declare(self, classes: Sequence[str]) -> None:
        """The source names these classes, in this order."""
        self.classes += [name for name in classes if name not in self.classes]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Intake:
    """The recipe's rule for bad images, and the count of what it met."""

    rule: str
    """``skip`` or ``fail``."""
    report: Report

    def bad(self, where: str, reason: str) -> None:
        """Leave an image out, or stop."""
        if self.rule == "fail":
            raise UserError(f"{where}: {reason}; data.bad 'skip' leaves such images out")
        self.report.bad += 1
        if len(self.report.notes) < NOTES:
            self.report.notes.append(f"{where}: {reason}")


def label_name(value: Any, names: Sequence[str]) -> str | None:
    """The class's name from what a source holds: a number or a name; None where there is none (null, or below 0).

    Args:
        value: a number, a string, or UTF-8 bytes.
        names: of the classes by number, if they are known.

    Raises:
        ValueError: it is no label, or a number that has no name.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | np.integer):
        raise ValueError(f"the label {value!r} is neither a number nor a name")
    if value < 0:  # what Hugging Face's datasets say of a hidden label
        return None
    if names and value >= len(names):
        raise ValueError(f"the label {value} is out of range: there are {len(names)} classes")
    return names[int(value)] if names else str(value)


def caption_text(value: Any) -> str | None:
    """A caption from what a source holds; the first of a list."""
    if isinstance(value, list | tuple | np.ndarray):
        value = value[0] if len(value) else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return (" ".join(str(value).split()) or None) if value is not None else None


def wanted_keys(file: ImageFile, kind: str, known: Sequence[str]) -> dict[str, str]:
    """Which of the keys (columns, features) that there are hold the ``image``, the ``label`` and the ``caption``.

    A label that the recipe does not name itself may be absent.

    Args:
        file: with the names that the recipe gives.
        kind: what the format calls them.
        known: the keys that there are.

    Raises:
        UserError: a key that the recipe names is not there.
    """
    found = {}
    for role, name in (("image", file.image), ("label", file.label), ("caption", file.caption)):
        if name is None:
            continue
        if name in known:
            found[role] = name
        elif not (role == "label" and not file.label_named):
            raise UserError(
                f"{file.url}: no {kind} '{name}' (data.sources[{file.source}].{role}){nearest(name, list(known))} "
                f"It has {', '.join(repr(key) for key in known[:12])}"
            )
    return found

"""Images of a run inside its page: as data, so that the page stays one file."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path

_LARGEST = 2_000_000
"""Bytes of a PNG that is taken into the page; a larger one is only named."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """An image that the page shows."""

    source: str
    """A ``data:`` address."""
    width: int
    height: int


def picture(directory: Path, name: str) -> Picture | None:
    """The PNG of this name in a run directory; None where there is none there, or one too large for the page."""
    path = directory / name
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
        if not inside or path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
    except (OSError, ValueError):  # the page must not depend on a file that was moved since
        return None
    if not content.startswith(_SIGNATURE) or content[12:16] != b"IHDR" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    return Picture("data:image/png;base64," + base64.b64encode(content).decode(), width, height)

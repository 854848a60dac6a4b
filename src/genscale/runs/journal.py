"""A journal: one JSON object a line, only ever appended to.

A process killed in the middle of a line leaves it torn. Readers leave a torn last line out, and the next append cuts
it off. Numbers that JSON has no word for (nan, inf) are written as null, so that every reader can read the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genscale.runs.disk import writing
from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically


def plain(value: Any) -> Any:
    """Values as JSON has them: 0-dim tensors and numpy numbers as numbers, nan and inf as null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if not isinstance(value, (str, int, float)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _cut_torn_line(descriptor: int) -> None:
    """Cut the file after its last newline."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one line; it is with the operating system, and so safe from a SIGKILL, when this returns."""
    line = _line(record)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            _cut_torn_line(descriptor)
            while line:  # a nearly full disk takes a part of the line before it reports ENOSPC
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line; raises UserError on a damaged one that is not the last."""
    if not path.exists():
        return []
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    records = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            found = line[:40].decode(errors="replace")
            raise UserError(f"{path}, line {number}: expected one JSON object, found {found!r}")
        records.append(record)
    return records


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the wanted lines; the file is rewritten aside and renamed, and left alone when nothing changes."""
    records = read(path)
    kept = [record for record in records if wanted(record)]
    if len(kept) < len(records):
        with writing(path):
            write_atomically(path, b"".join(map(_line, kept)))

"""The output of a work unit: a folder that is written aside and renamed when it is whole, so that it is made once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genscale.runtime.files import checksum, sync_folder, write_atomically


def unit_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def write_unit(folder: Path, number: int, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Have ``work`` fill the unit's folder below ``folder``, unless its finished output is there.

    Args:
        folder: where the outputs of this task are.
        number: the unit's.
        work: writes files into the folder that it is given, and returns a summary that json can hold.

    Returns:
        The summary, with the files' checksums.
    """
    finished = unit_folder(folder, number)
    summary = _finished(finished)
    if summary is not None:
        return summary
    aside = folder / f".{number:06d}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        summary = work(aside)
        summary["files"] = {file.name: checksum(file) for file in sorted(aside.iterdir())}
        write_atomically(aside / "summary.json", json.dumps(summary))
        sync_folder(aside)
        if finished.exists():  # damaged, or finished meanwhile by an orphan of an earlier attempt
            shutil.rmtree(finished)
        os.rename(aside, finished)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return summary


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a unit whose output is there and whole."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        whole = all(checksum(folder / name) == expected for name, expected in summary["files"].items())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return summary if whole else None

"""Snapshots of power-function averages, kept in a run's ``averages/`` while it trains.

One file holds all lengths of one network's averages at one time: ``model-000000051200.safetensors`` after 51,200
samples, with tensors ``0.05/blocks.0.norm.weight``. A file appears by a rename when all of it is on the disk; written
again after a resume it is the same to the bit, because the averages are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import export_weights

_FILE = re.compile(r"(?P<network>.+)-(?P<samples>\d{12,})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """One average of a network at one time."""

    length: float
    """Relative standard deviation of its profile."""
    samples: int
    """Seen when it was taken."""
    tensors: Mapping[str, Tensor]
    """By parameter; those of a file are read one by one, when they are asked for."""


def averages_folder(run: Run) -> Path:
    """Where a run keeps its snapshots."""
    return run.directory / "averages"


def snapshots_of(tensors: Mapping[str, Tensor], samples: int) -> list[Snapshot]:
    """The averages of each length in what :meth:`PowerAverage.snapshot` gave after so many samples."""
    names: dict[float, dict[str, str]] = {}
    for key in tensors:
        length, name = key.split("/", 1)
        names.setdefault(float(length), {})[name] = key
    return [Snapshot(length, samples, _Renamed(tensors, each)) for length, each in names.items()]


def write_snapshot(folder: Path, network: str, samples: int, tensors: Mapping[str, Tensor]) -> None:
    """Write what :meth:`PowerAverage.snapshot` gave, atomically. Under a process group every rank calls it.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    export_weights(folder / f"{network}-{samples:012d}.safetensors", tensors, {"samples": str(samples)})


def read_snapshots(folder: Path, network: str, before: int | None = None) -> list[Snapshot]:
    """A network's snapshots in order of time, of ``before`` so many samples; none where there is no folder.

    Raises:
        UserError: a file that cannot be read.
    """
    found: list[Snapshot] = []
    for path, samples in _files(folder, network):
        if before is None or samples < before:
            found += snapshots_of(_File(path), samples)
    return found


def drop_later(folder: Path, samples: int) -> None:
    """Remove snapshots of after so many samples, which are about to be run again, and what a killed process left
    half-written. On one process."""
    for left in folder.glob(".*.aside"):
        left.unlink()
    for path, taken in _files(folder):
        if taken > samples:
            path.unlink()


def _files(folder: Path, network: str | None = None) -> list[tuple[Path, int]]:
    """Snapshot files with their samples, by time."""
    matches = [(path, _FILE.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ())]
    files = [(path, int(match["samples"])) for path, match in matches if match and network in (None, match["network"])]
    return sorted(files, key=lambda file: (file[1], file[0].name))


class _Renamed(Mapping[str, Tensor]):
    """Some of the tensors, under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _File(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read one by one."""

    def __init__(self, path: Path):
        try:
            self._open = safe_open(path, framework="pt")
            self._names = self._open.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"the snapshot {path} is damaged ({error}); delete it to do without it") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._open.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

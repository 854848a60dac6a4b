"""Sources: from the paths in a recipe to the files that they name, in an order that never changes.

A new kind of source is a function that gives :class:`SourceFile` entries; a new file format is a reader in
:mod:`genscale.data.formats`.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from genscale.data import compressed, remote
from genscale.recipe.data import Source
from genscale.runtime.errors import UserError, nearest

STANDARD_LIBRARY = "python:stdlib"
HUGGING_FACE = "hf:"

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source, or one split of a Hugging Face dataset."""

    source: int
    """Number of the source in the recipe."""
    name: str
    """The source as the recipe names it."""
    url: str
    """What opens it: a local path, a URL for fsspec, or the name of a dataset."""
    path: str
    """Within the source, with ``/`` on every system."""
    size: int | None
    """Bytes as stored (for a dataset, in memory); None when the server does not say."""
    version: str
    """Changes when the file does: modification time, entity tag or fingerprint."""
    ranges: bool
    """Whether it can be read from any place."""
    format: str
    """Which reader reads it; ``hf`` for a dataset."""
    compression: str | None
    licence: str | None

    @property
    def local(self) -> bool:
        return "://" not in self.url and self.format != "hf"

    def open(self, seek: bool = False) -> BinaryIO:
        """The file's bytes, decompressed, from the beginning; with ``seek`` from any place, if it is not compressed."""
        try:
            raw = open(self.url, "rb") if self.local else remote.opened(self.url, seek, self.ranges)  # noqa: SIM115
        except Exception as error:  # each file system raises its own kinds
            raise UserError(f"data.sources[{self.source}]: cannot read {self.url}: {remote.reason(error)}") from None
        return compressed.reader(raw, self.compression) if self.compression else raw


@dataclass(frozen=True, slots=True)
class SourceFile(File):
    """A file of documents: its format is ``text``, ``jsonl``, ``csv``, ``parquet`` or ``hf``."""

    text: str
    """Column or key that holds the text."""
    split: str


def list_files(sources: Sequence[Source]) -> list[SourceFile]:
    """The files of all sources: in the order of the recipe, and by path within each.

    Raises:
        UserError: there are no sources, or one of them has no file or cannot be reached.
    """
    if not sources:
        raise UserError("data.sources is empty; expected at least one file, folder, glob, URL, or 'python:stdlib'")
    return [file for number, source in enumerate(sources) for file in _list_source(number, source)]


def _list_source(number: int, source: Source) -> list[SourceFile]:
    where = f"data.sources[{number}]"
    licence = source.licence
    if source.path.startswith(HUGGING_FACE):
        return [_dataset(number, source)]
    if source.path == STANDARD_LIBRARY:
        found = _standard_library()
        licence = licence or "PSF-2.0"
    else:
        found = find_entries(where, source.path)
    files = []
    for entry in chosen_entries(where, source.path, sorted(found), source.exclude):
        stem, compression = compressed.split_ending(entry.path)
        format = source.format
        if format == "auto":
            format = _FORMATS.get(PurePosixPath(stem).suffix.lower(), "text")  # type: ignore[assignment]
        files.append(
            SourceFile(
                source=number,
                name=source.path,
                **entry._asdict(),
                format=format,
                compression=compression,
                text=source.text,
                split=source.split,
                licence=licence,
            )
        )
    return files


class Entry(NamedTuple):
    """A file as it is found; see :class:`File`."""

    path: str
    url: str
    size: int | None
    version: str
    ranges: bool = True


def find_entries(where: str, path: str) -> list[Entry]:
    """The files that a path, a glob or a URL names, in no order.

    Raises:
        UserError: there is nothing of that name, or it cannot be reached; ``where`` is the recipe's key.
    """
    return _list_remote(where, path) if "://" in path else _list_local(where, path)


def chosen_entries(where: str, path: str, entries: Sequence[Entry], exclude: Sequence[str]) -> list[Entry]:
    """The entries that no glob of ``exclude`` matches; raises UserError where none is left."""
    expressions = [_glob_expression(pattern) for pattern in exclude]
    chosen = [entry for entry in entries if not any(expression.fullmatch(entry.path) for expression in expressions)]
    if not chosen:
        left = ", all of them excluded by its 'exclude'" if entries and exclude else ""
        raise UserError(f"{where}: '{path}' matches no file{left}")
    return chosen


def local_entry(file: Path, root: Path) -> Entry:
    status = file.stat()
    return Entry(file.relative_to(root).as_posix(), str(file), status.st_size, str(status.st_mtime_ns))


def _list_local(where: str, path: str) -> list[Entry]:
    place = Path(path).expanduser()
    if place.is_dir():
        return [local_entry(file, place) for file in _walk(place)]
    if place.exists():
        return [local_entry(place, place.parent)]
    if glob.has_magic(path):
        parts = place.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = (root / match for match in glob.glob(str(Path(*parts[fixed:])), root_dir=root, recursive=True))
        return [local_entry(match, root) for match in matches if match.is_file()]
    siblings = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    raise UserError(f"{where}: there is no file or folder '{path}'{nearest(place.name, siblings)}")


def _walk(folder: Path, skipped: Collection[str] = ()) -> Iterator[Path]:
    """The files below a folder, without hidden files and folders and those of the skipped names."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            file = Path(root, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _list_remote(where: str, url: str) -> list[Entry]:
    try:
        root, system, entries = remote.find(url)
    except ImportError as error:
        raise UserError(f"{where}: '{url}' needs a library: {error}; try pip install 'genscale[cloud]'") from None
    except Exception as error:  # each file system raises its own kinds
        raise UserError(f"{where}: cannot read '{url}': {remote.reason(error)}") from None
    return [
        Entry(
            path=entry["name"].removeprefix(root),
            url=system.unstrip_protocol(entry["name"]),
            size=entry.get("size"),
            version=remote.version(entry),
            ranges=remote.has_ranges(url, entry),
        )
        for entry in entries
    ]


def _standard_library() -> list[Entry]:
    """Python's own sources, without installed packages and the generated tables of ``encodings``."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, skipped={"site-packages", "dist-packages", "encodings", "__pycache__"})
    return [local_entry(file, root) for file in files if file.suffix == ".py"]


def _dataset(number: int, source: Source) -> SourceFile:
    from genscale.data.huggingface import load

    name = source.path.removeprefix(HUGGING_FACE)
    dataset = load(name, source.split, where=f"data.sources[{number}]")
    return SourceFile(
        source=number,
        name=source.path,
        url=name,
        path=source.split,
        size=dataset.data.nbytes,
        version=dataset._fingerprint,
        ranges=True,
        format="hf",
        compression=None,
        text=source.text,
        split=source.split,
        licence=source.licence or dataset.info.license or None,
    )


def _glob_expression(pattern: str) -> re.Pattern[str]:
    """A glob in which ``*`` stays within a folder and ``**`` does not; one without ``/`` is met at any depth."""
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    expression = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern, flags=re.DOTALL):
        if token.startswith("[") and len(token) > 1:
            expression += "[^" + token[2:] if token[1] == "!" else token
        else:
            special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            expression += special.get(token, re.escape(token))
    return re.compile(expression, flags=re.DOTALL)

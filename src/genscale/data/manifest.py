"""What every store is, whatever it holds: files, a documents table, a manifest with one fingerprint for the whole."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum, sync_folder, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
SPLITS = ("train", "validation")
DOCUMENTS_FILE = "documents.parquet"


def partial_folder(store: Path) -> Path:
    """Where an unfinished store is built."""
    return store.with_name(store.name + ".partial")


def kind_of(path: str | Path) -> str:
    """What the store in this folder holds: ``"text"`` or ``"images"``.

    Raises:
        UserError: there is no store, it is not finished, or its manifest is damaged.
    """
    return _read_manifest(Path(path).expanduser()).get("kind", "text")


class StoreFolder:
    """A finished, immutable store: its manifest and its files. Open one by its kind's ``open``."""

    kind: ClassVar[str]
    keys: ClassVar[frozenset[str]]
    """What the manifest of this kind must have."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the store in the folder ``path``.

        Raises:
            UserError: there is no store, it is not finished, it holds something else, or its manifest is damaged.
        """
        path = Path(path).expanduser()
        manifest = _read_manifest(path)
        kind = manifest.get("kind", "text")
        if kind != cls.kind:
            raise UserError(f"the store {path} holds {kind}, expected {cls.kind}")
        absent = cls.keys - manifest.keys()
        if absent:
            raise UserError(
                f"{path / 'manifest.json'} lacks {', '.join(sorted(absent))}; delete the folder and prepare it anew"
            )
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.manifest["dtype"])

    def shards(self, split: str) -> list[np.ndarray]:
        """The split's data: memory-mapped arrays, in order."""
        return [self._map(name) for name in self._split(split)["shards"]]

    def documents(self) -> pa.Table:
        """The documents table: one row for each document or image, with where it came from."""
        import pyarrow.parquet as pq

        return pq.read_table(self._file(DOCUMENTS_FILE))

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            UserError: a file is missing or is not what was written.
        """
        for name, expected in self.manifest["files"].items():
            found = checksum(self._file(name))
            if found != expected:
                raise UserError(
                    f"{self.path / name} is damaged: its checksum is {found}, the manifest says {expected}; "
                    f"delete the folder {self.path} and run 'genscale data prepare RECIPE'"
                )

    def _split(self, split: str) -> dict[str, Any]:
        try:
            return self.manifest["splits"][split]
        except KeyError:
            raise UserError(f"the store {self.path} has no split '{split}', expected one of {list(SPLITS)}") from None

    def _file(self, name: str) -> Path:
        file = self.path / name
        if not file.exists():
            raise UserError(
                f"{file} is missing from the store; delete {self.path} and run 'genscale data prepare RECIPE'"
            )
        return file

    def _map(self, name: str) -> np.ndarray:
        file = self._file(name)
        try:
            return np.load(file, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); delete {self.path} and prepare it anew") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store in this folder; raises UserError where there is no whole one of this format."""
    file = path / "manifest.json"
    if not file.exists():
        if partial_folder(path).exists():
            raise UserError(
                f"the store {path} is not finished; run 'genscale data prepare RECIPE' again and it goes on"
            )
        raise UserError(f"there is no store in {path}; 'genscale data prepare RECIPE' makes it")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete the folder {path} and run 'genscale data prepare RECIPE'") from None
    if version != FORMAT:
        raise UserError(f"{file}: store format {version} is not known here, expected {FORMAT}; prepare it anew")
    return manifest


class DocumentsTable:
    """Writes ``documents.parquet`` and takes a digest of the content of each column as it goes.

    The parquet file's own bytes depend on the version of pyarrow, so that the fingerprint is of the content instead.
    """

    def __init__(self, folder: Path, schema: pa.Schema):
        import pyarrow.parquet as pq

        self.path = folder / DOCUMENTS_FILE
        self.schema = schema
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in schema.names}
        self._writer = pq.ParquetWriter(self.path, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        for name, digest in self._digests.items():
            digest.update(json.dumps(table[name].to_pylist(), separators=(",", ":"))[1:-1].encode() + b",")
        self._writer.write_table(table)

    def finish(self) -> dict[str, str]:
        """Close the file; returns the digest of each column."""
        self._writer.close()
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def close(self) -> None:
        """Give the table up unfinished."""
        self._writer.close()


def write_manifest(
    folder: Path,
    identity: Sequence[Any],
    files: Iterable[str],
    columns: Mapping[str, str],
    facts: Mapping[str, Any],
    without: Iterable[str] = (),
) -> dict[str, Any]:
    """Write ``manifest.json``, the last file of a store, and return it.

    The fingerprint is of ``identity``, of the content of the files, and of the columns of the documents table: not of
    the time, the place, or the number of processes.

    Args:
        identity: what else tells this store from others (the format, the names of the shards).
        files: names of all files but the manifest and the documents table.
        columns: the digests that :meth:`DocumentsTable.finish` gave.
        facts: the rest of the manifest.
        without: files that are left out of the fingerprint.
    """
    checksums = {name: checksum(folder / name) for name in [*files, DOCUMENTS_FILE]}
    left_out = {DOCUMENTS_FILE, *without}
    contents: dict[str, Any] = {name: value for name, value in checksums.items() if name not in left_out}
    contents["documents"] = dict(columns)
    fingerprint = hashlib.blake2b(json.dumps([*identity, contents], sort_keys=True).encode(), digest_size=16)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        **facts,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": checksums,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    sync_folder(folder)
    return manifest

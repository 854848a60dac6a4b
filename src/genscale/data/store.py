"""The store: tokenised text in files that numpy and pyarrow read by themselves.

    manifest.json             what is here, how it was made, checksums, and one fingerprint for the whole
    tokenizer.json            a standard tokenizer file
    documents.parquet         one row for each document (two when it is cut by ``split.by: tail``)
    train-00000.npy ...       the tokens, 1-D uint16 or uint32; the shards of a split in order are the split
    train-documents.npy       int64, ascending: the first token of each document, counted from the split's start
    validation-00000.npy ... validation-documents.npy

``docs/store.md`` describes the format for those who read it without genscale.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from genscale.data.tokenizer import Tokenizer
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum, sync_folder, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
SPLITS = ("train", "validation")


def documents_schema() -> pa.Schema:
    """The columns of documents.parquet."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.int64()),  # number of the document in the store, from 0
            ("source", pa.string()),  # the source as the recipe names it
            ("path", pa.string()),  # the file within the source
            ("position", pa.int64()),  # record number in the file (parquet, csv), byte offset (jsonl), 0 (text)
            ("licence", pa.string()),
            ("size", pa.int64()),  # UTF-8 bytes of the text in this split
            ("hash", pa.string()),  # blake2b of the whole document's text, 32 hex digits
            ("split", pa.string()),
            ("start", pa.int64()),  # first token, counted from the split's start
            ("tokens", pa.int64()),  # with the end-of-document token
        ]
    )


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


class Store:
    """A finished, immutable store. Open it with :meth:`Store.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store in the folder ``path``.

        Raises:
            UserError: there is no store, it is not finished, or its manifest is damaged.
        """
        path = Path(path).expanduser()
        file = path / "manifest.json"
        if not file.exists():
            if partial_folder(path).exists():
                raise UserError(
                    f"the store {path} is not finished; run 'genscale data prepare RECIPE' again and it goes on"
                )
            raise UserError(f"there is no store in {path}; 'genscale data prepare RECIPE' makes it")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            version = manifest["format"]
            absent = {"fingerprint", "dtype", "end_of_document", "splits", "files"} - manifest.keys()
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(
                f"{file} is damaged; delete the folder {path} and run 'genscale data prepare RECIPE'"
            ) from None
        if version != FORMAT:
            raise UserError(f"{file}: store format {version} is not known here, expected {FORMAT}; prepare it anew")
        if absent:
            raise UserError(f"{file} lacks {', '.join(sorted(absent))}; delete the folder and prepare it anew")
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.manifest["dtype"])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._file("tokenizer.json"), self.manifest["end_of_document"]["token"])

    def tokens(self, split: str) -> int:
        """Number of tokens in the split."""
        return self._split(split)["tokens"]

    def bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's text."""
        return self._split(split)["bytes"]

    def shards(self, split: str) -> list[np.ndarray]:
        """The split's tokens: memory-mapped 1-D arrays, in order."""
        return [self._map(name) for name in self._split(split)["shards"]]

    def document_starts(self, split: str) -> np.ndarray:
        """(documents,) int64, memory-mapped and ascending: the first token of each document in the split."""
        return self._map(f"{split}-documents.npy")

    def documents(self) -> pa.Table:
        """The documents table; see :func:`documents_schema` for its columns."""
        import pyarrow.parquet as pq

        return pq.read_table(self._file("documents.parquet"))

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


def partial_folder(store: Path) -> Path:
    """Where an unfinished store is built."""
    return store.with_name(store.name + ".partial")


class ArrayFile:
    """A ``.npy`` file of one dimension, written piece by piece: its length is put into the header at the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by finish)
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Give the file up unfinished."""
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that the length may grow in place: every length gives a header of equal size
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class StoreWriter:
    """Writes the files of a store into a folder, part after part, in bounded memory.

    Args:
        folder: an existing folder; files of an earlier attempt in it are overwritten.
        tokenizer: whose ids the tokens are.
        shard_tokens: tokens in each shard but the last.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        import pyarrow.parquet as pq

        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.size)
        self.shard_tokens = shard_tokens
        self._shards: dict[str, list[ArrayFile]] = {split: [] for split in SPLITS}
        self._starts = {split: ArrayFile(folder / f"{split}-documents.npy", np.dtype(np.int64)) for split in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._documents = 0
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in documents_schema().names}
        self._table = pq.ParquetWriter(folder / "documents.parquet", documents_schema(), compression="zstd")

    def add(self, tokens: Iterable[tuple[str, np.ndarray]], documents: Iterable[pa.Table]) -> None:
        """Append a part: its tokens, as (split, tokens) in order, and its rows of the documents table.

        ``id`` and ``start`` of the rows count from this part; they are moved to where the part begins.
        """
        first_document, first_token = self._documents, dict(self._tokens)
        for table in documents:
            if table.num_rows:
                self._add_documents(table, first_document, first_token)
        for split, values in tokens:
            self._add_tokens(split, values)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Close every file, write the manifest last, and return it. ``facts`` are added to the manifest."""
        self._table.close()
        with open(self.folder / "documents.parquet", "rb") as file:
            os.fsync(file.fileno())
        for split in SPLITS:
            self._starts[split].finish()
            if self._shards[split]:
                self._shards[split][-1].finish()
        self.tokenizer.save(self.folder / "tokenizer.json")
        names = {split: [shard.path.name for shard in self._shards[split]] for split in SPLITS}
        files = [
            *(name for split in SPLITS for name in (*names[split], f"{split}-documents.npy")),
            "documents.parquet",
            "tokenizer.json",
        ]
        checksums = {name: checksum(self.folder / name) for name in files}
        # The parquet file's bytes depend on the version of pyarrow, so that the table's content is taken instead.
        contents = {name: value for name, value in checksums.items() if name != "documents.parquet"}
        contents["documents"] = {name: digest.hexdigest() for name, digest in self._digests.items()}  # type: ignore[assignment]
        identity = json.dumps([FORMAT, names, contents], sort_keys=True)
        manifest = {
            "format": FORMAT,
            "fingerprint": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
            "dtype": self.dtype.name,
            "vocabulary": self.tokenizer.size,
            "end_of_document": {"token": self.tokenizer.end_of_document_token, "id": self.tokenizer.end_of_document},
            "documents": self._documents,
            "splits": {
                split: {
                    "documents": self._starts[split].length,
                    "tokens": self._tokens[split],
                    "bytes": self._bytes[split],
                    "shards": names[split],
                }
                for split in SPLITS
            },
            **facts,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": checksums,
        }
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        sync_folder(self.folder)
        return manifest

    def close(self) -> None:
        """Give the store up unfinished."""
        self._table.close()
        for file in (*self._starts.values(), *(shard for shards in self._shards.values() for shard in shards)):
            file.close()

    def _add_documents(self, table: pa.Table, first_document: int, first_token: dict[str, int]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        splits = np.array(table["split"].to_pylist())
        starts = table["start"].to_numpy().copy()
        sizes = table["size"].to_numpy()
        for split in SPLITS:
            here = splits == split
            starts[here] += first_token[split]
            self._starts[split].append(starts[here])
            self._bytes[split] += int(sizes[here].sum())
        moved = {"id": pc.add(table["id"], first_document), "start": pa.array(starts)}
        schema = documents_schema()
        table = pa.table({name: moved.get(name, table[name]) for name in schema.names}, schema=schema)
        self._documents = table["id"][-1].as_py() + 1
        for name, digest in self._digests.items():
            digest.update(json.dumps(table[name].to_pylist(), separators=(",", ":"))[1:-1].encode() + b",")
        self._table.write_table(table)

    def _add_tokens(self, split: str, tokens: np.ndarray) -> None:
        shards = self._shards[split]
        written = 0
        while written < len(tokens):
            if not shards or shards[-1].length == self.shard_tokens:
                if shards:
                    shards[-1].finish()
                shards.append(ArrayFile(self.folder / f"{split}-{len(shards):05d}.npy", self.dtype))
            piece = tokens[written : written + self.shard_tokens - shards[-1].length]
            shards[-1].append(piece)
            written += len(piece)
        self._tokens[split] += len(tokens)


def write_store(
    path: str | Path,
    splits: Mapping[str, Iterable[Sequence[int] | np.ndarray]],
    tokenizer: Tokenizer,
    shard_tokens: int = 100_000_000,
) -> Store:
    """Make a store from tokens: ``splits`` gives each split's documents, each an array of token ids.

    The tokens are stored as they are given: no end-of-document token is added.
    """
    import pyarrow as pa

    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; choose another folder or delete it")
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = StoreWriter(partial, tokenizer, shard_tokens)
    for split, documents in splits.items():
        for number, document in enumerate(documents):
            text = tokenizer.decode_bytes([int(token) for token in document if token != tokenizer.end_of_document])
            row = {
                "id": 0,
                "source": "tokens",
                "path": split,
                "position": number,
                "licence": None,
                "size": len(text),
                "hash": hashlib.blake2b(text, digest_size=16).hexdigest(),
                "split": split,
                "start": 0,
                "tokens": len(document),
            }
            writer.add([(split, np.asarray(document))], [pa.Table.from_pylist([row], schema=documents_schema())])
    writer.finish({})
    os.rename(partial, path)
    sync_folder(path.parent)
    return Store(path, json.loads((path / "manifest.json").read_text(encoding="utf-8")))

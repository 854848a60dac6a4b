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
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from genscale.data.array_file import ArrayFile, ShardFiles
from genscale.data.manifest import FORMAT, SPLITS, DocumentsTable, StoreFolder, partial_folder, write_manifest
from genscale.data.tokenizer import Tokenizer
from genscale.runtime.errors import UserError
from genscale.runtime.files import sync_folder

if TYPE_CHECKING:
    import pyarrow as pa


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


class Store(StoreFolder):
    """A finished, immutable store of tokens. Open it with :meth:`Store.open`."""

    kind: ClassVar[str] = "text"
    keys: ClassVar[frozenset[str]] = frozenset({"fingerprint", "dtype", "end_of_document", "splits", "files"})

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._file("tokenizer.json"), self.manifest["end_of_document"]["token"])

    def tokens(self, split: str) -> int:
        """Number of tokens in the split."""
        return self._split(split)["tokens"]

    def bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's text."""
        return self._split(split)["bytes"]

    def document_starts(self, split: str) -> np.ndarray:
        """(documents,) int64, memory-mapped and ascending: the first token of each document in the split."""
        return self._map(f"{split}-documents.npy")


class StoreWriter:
    """Writes the files of a store into a folder, part after part, in bounded memory.

    Args:
        folder: an existing folder; files of an earlier attempt in it are overwritten.
        tokenizer: whose ids the tokens are.
        shard_tokens: tokens in each shard but the last.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.size)
        self._shards = {split: ShardFiles(folder, split, self.dtype, shard_tokens) for split in SPLITS}
        self._starts = {split: ArrayFile(folder / f"{split}-documents.npy", np.dtype(np.int64)) for split in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._documents = 0
        self._table = DocumentsTable(folder, documents_schema())

    def add(self, tokens: Iterable[tuple[str, np.ndarray]], documents: Iterable[pa.Table]) -> None:
        """Append a part: its tokens, as (split, tokens) in order, and its rows of the documents table.

        ``id`` and ``start`` of the rows count from this part; they are moved to where the part begins.
        """
        first_document, first_token = self._documents, dict(self._tokens)
        for table in documents:
            if table.num_rows:
                self._add_documents(table, first_document, first_token)
        for split, values in tokens:
            self._shards[split].append(values)
            self._tokens[split] += len(values)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Close every file, write the manifest last, and return it. ``facts`` are added to the manifest."""
        columns = self._table.finish()
        for split in SPLITS:
            self._starts[split].finish()
            self._shards[split].finish()
        self.tokenizer.save(self.folder / "tokenizer.json")
        names = {split: self._shards[split].names for split in SPLITS}
        files = [*(name for split in SPLITS for name in (*names[split], f"{split}-documents.npy")), "tokenizer.json"]
        return write_manifest(
            self.folder,
            [FORMAT, names],
            files,
            columns,
            {
                "kind": Store.kind,
                "dtype": self.dtype.name,
                "vocabulary": self.tokenizer.size,
                "end_of_document": {
                    "token": self.tokenizer.end_of_document_token,
                    "id": self.tokenizer.end_of_document,
                },
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
            },
        )

    def close(self) -> None:
        """Give the store up unfinished."""
        self._table.close()
        for split in SPLITS:
            self._starts[split].close()
            self._shards[split].close()

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
        self._table.add(table)


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
    return Store.open(path)

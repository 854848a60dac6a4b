"""The tokens of a unit: texts gathered, tokenised many at once, written raw with the rows of the documents table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genscale.data.bpe_dropout import BPEDropout
from genscale.data.documents import Document
from genscale.data.formats import Report
from genscale.data.sources import SourceFile
from genscale.data.store import SPLITS, documents_schema, token_dtype
from genscale.data.tokenizer import Tokenizer
from genscale.data.units import Unit
from genscale.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1 << 22  # characters that are tokenised at once
_ROWS = 10_000  # of the documents table that are written at once


def utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Text(NamedTuple):
    """A text that waits to be tokenised."""

    content: str
    first_character: int
    """Where in its document it begins."""
    ends: bool
    """Whether its document has no more of this split."""
    row: int
    """Of the documents table, as an index into those not yet written."""


class UnitWriter:
    """Gathers texts, tokenises many at once, and writes tokens and rows of the documents table.

    Args:
        tokenizer: of all splits.
        files: of the tokens, by split.
        table: of the documents.
        dropout: encodes the training split in the tokenizer's place.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        files: dict[str, Any],
        table: pa.RecordBatchWriter,
        dropout: BPEDropout | None = None,
    ):
        self._tokenizer = tokenizer
        self._dropout = dropout
        self._files = files
        self._table = table
        self._dtype = token_dtype(tokenizer.size)
        self._checked = False
        self._rows: list[dict[str, Any]] = []
        self._open: dict[str, int] = {}  # the current document's row by split, as an index into _rows
        self._base: dict[str, Any] = {}
        self._report = Report()
        self._reports: list[Report] = []  # of each row
        self._documents = 0
        self._written = dict.fromkeys(SPLITS, 0)
        self._waiting: dict[str, list[_Text]] = {split: [] for split in SPLITS}
        self._characters = 0

    def begin(self, document: Document, file: SourceFile, report: Report) -> None:
        self._base = {
            "id": self._documents,
            "source": file.name,
            "path": file.path,
            "position": document.position,
            "licence": file.licence,
            "hash": document.hash,
        }
        self._report = report
        self._documents += 1

    def add(self, split: str, text: str, first_character: int, ends: bool) -> None:
        """The next text of the document, and of this split.

        Args:
            split: that it is in.
            text: what to write.
            first_character: where in the document it begins.
            ends: whether the document has no more of this split.
        """
        if split not in self._open:
            self._open[split] = len(self._rows)
            self._rows.append({**self._base, "split": split, "size": 0, "tokens": 0, "start": None})
            self._reports.append(self._report)
        row = self._open[split]
        size = utf8_length(text)
        self._rows[row]["size"] += size
        self._report.count(split, "bytes", size)
        self._report.count(split, "documents", int(ends))
        self._waiting[split].append(_Text(text, first_character, ends, row))
        self._characters += len(text)
        if self._characters >= _BATCH:
            self._tokenise()

    def end(self) -> None:
        self._open.clear()
        if len(self._rows) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write everything; between documents only."""
        import pyarrow as pa

        self._tokenise()
        self._table.write_table(pa.Table.from_pylist(self._rows, schema=documents_schema()))
        self._rows.clear()
        self._reports.clear()

    def _tokenise(self) -> None:
        end = self._tokenizer.end_of_document
        for split, waiting in self._waiting.items():
            if not waiting:
                continue
            tokens, offsets = self._encoded(split, waiting)
            ends = np.array([text.ends for text in waiting]) & (end is not None)
            counts = np.diff(offsets) + ends
            if end is not None:
                tokens = np.insert(tokens, offsets[1:][ends], end)
            self._files[split].write(np.ascontiguousarray(tokens, self._dtype).data)
            written = self._written[split]
            for text, count in zip(waiting, counts.tolist(), strict=True):
                row = self._rows[text.row]
                if row["start"] is None:
                    row["start"] = written
                row["tokens"] += count
                written += count
                self._reports[text.row].count(split, "tokens", count)
            self._written[split] = written
            waiting.clear()
        self._characters = 0

    def _encoded(self, split: str, waiting: list[_Text]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts, and where those of each begin."""
        texts = [text.content for text in waiting]
        if not self._checked:
            self._tokenizer.check([texts[0][:10_000]])
            self._checked = True
        if self._dropout is not None and split == "train":
            places = [(self._rows[text.row]["hash"], text.first_character) for text in waiting]
            return self._dropout.encode_flat(texts, places)
        try:
            return self._tokenizer.encode_flat(texts)
        except UserError as error:
            raise UserError(f"{self._faulty(waiting)}: {error}") from None

    def _faulty(self, waiting: list[_Text]) -> str:
        """The file of the first text that cannot be encoded."""
        for text in waiting:
            try:
                self._tokenizer.encode(text.content)
            except UserError:
                return self._rows[text.row]["path"]
        return "a document"


def unit_outputs(
    folder: Path, units: Sequence[Unit], dtype: np.dtype
) -> Iterator[tuple[Iterator[tuple[str, np.ndarray]], Iterable[pa.Table]]]:
    """For the store's writer: the (split, tokens) and the tables of each unit, the ranges of a long text as one."""
    for _, group in itertools.groupby(units, key=lambda unit: unit.group):
        folders = [folder / f"{unit.number:06d}" for unit in group]
        files = [(split, place / f"{split}.tokens") for split in SPLITS for place in folders]
        tokens = ((split, chunk) for split, file in files for chunk in _raw_tokens(file, dtype))
        tables = (table for place in folders for table in _tables(place / "documents.arrow"))
        yield tokens, tables if len(folders) == 1 else [_one_document(tables)]


def _raw_tokens(file: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 24):
            yield np.frombuffer(chunk, dtype)


def _tables(file: Path) -> Iterator[pa.Table]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _one_document(tables: Iterator[pa.Table]) -> pa.Table:
    """The rows of the ranges of one document, one row for each split."""
    import pyarrow as pa

    merged: dict[str, dict[str, Any]] = {}
    for row in (row for table in tables for row in table.to_pylist()):
        first = merged.setdefault(row["split"], {**row, "id": 0, "start": 0, "size": 0, "tokens": 0})
        first["size"] += row["size"]
        first["tokens"] += row["tokens"]
    return pa.Table.from_pylist(list(merged.values()), schema=documents_schema())

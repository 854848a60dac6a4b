"""Readers: from a piece of a file to its documents, in bounded memory, with every fault counted or refused.

A reader is a function ``(piece, intake) -> Iterator[Document]`` in :data:`READERS`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from genscale.data import compressed
from genscale.data.documents import Document, LongText, decode, long_blocks, measure
from genscale.data.sources import SourceFile
from genscale.runtime.errors import UserError, nearest

LONG = 1 << 26
"""A text file of more bytes is one document that is read in ranges and never held in memory."""

NOTES = 20
"""So many damaged parts are named in the manifest for each work unit; all are counted."""


@dataclass(frozen=True)
class Piece:
    """A file, or a range of it: bytes (text, jsonl), row groups (parquet), rows (hf)."""

    file: SourceFile
    start: int = 0
    stop: int | None = None
    long: LongText | None = None
    """Of a text that is read in ranges."""
    first_character: int = 0


@dataclass
class Report:
    """What became of a source's documents."""

    undecodable: int = 0
    """Documents with bytes that are not UTF-8."""
    damaged: int = 0
    """Parts of files that could not be read, and were left out."""
    dropped: int = 0
    """Documents left out because they were undecodable."""
    empty: int = 0
    """Documents without any text, left out."""
    notes: list[str] = field(default_factory=list)
    """Names of damaged and undecodable parts, the first few."""
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    """By split: documents, bytes and tokens."""

    def add(self, other: dict[str, Any]) -> None:
        """Add another report, as :meth:`to_dict` gives it."""
        for name in ("undecodable", "damaged", "dropped", "empty"):
            setattr(self, name, getattr(self, name) + other[name])
        self.notes = (self.notes + other["notes"])[:NOTES]
        for split, counts in other["splits"].items():
            for name, count in counts.items():
                self.count(split, name, count)

    def count(self, split: str, name: str, count: int) -> None:
        counts = self.splits.setdefault(split, {"documents": 0, "bytes": 0, "tokens": 0})
        counts[name] += count

    def note(self, message: str) -> None:
        if len(self.notes) < NOTES:
            self.notes.append(message)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Intake:
    """The recipe's rules for faulty input, and the count of what they met."""

    undecodable: str
    damaged: str
    report: Report

    def document(self, position: int, raw: bytes, where: Callable[[], str]) -> Iterator[Document]:
        """The document, unless it is empty or to be dropped."""
        text, bad = decode(raw)
        if bad is not None:
            if not self.keep_undecodable(where(), bad):
                return
            raw = text.encode()
        if text:
            yield Document.of(position, text, raw)
        else:
            self.report.empty += 1

    def keep_undecodable(self, where: str, offset: int | None) -> bool:
        at = "" if offset is None else f" from byte {offset} on"
        if self.undecodable == "fail":
            raise UserError(
                f"{where}: not UTF-8{at}; data.undecodable 'replace' puts U+FFFD there, 'drop' leaves the document out"
            )
        self.report.undecodable += 1
        self.report.note(f"{where}: not UTF-8{at}")
        if self.undecodable == "drop":
            self.report.dropped += 1
            return False
        return True

    def damage(self, where: str, reason: str) -> None:
        if self.damaged == "fail":
            raise UserError(f"{where}: damaged ({reason}); data.damaged 'drop' leaves it out")
        self.report.damaged += 1
        self.report.note(f"{where}: damaged ({reason})")


def read(piece: Piece, intake: Intake) -> Iterator[Document]:
    """The documents of a piece.

    Raises:
        UserError: the file cannot be read, lacks the text column, or has a fault that the recipe does not allow.
    """
    try:
        yield from READERS[piece.file.format](piece, intake)
    except Exception as error:
        if piece.file.compression and compressed.is_damage(error):
            reason = " ".join(str(error).split())
            intake.damage(piece.file.url, f"its {piece.file.compression} stream: {reason}")
        elif isinstance(error, OSError):
            raise UserError(f"cannot read {piece.file.url}: {error.strerror or error}") from None
        else:
            raise


def _read_text(piece: Piece, intake: Intake) -> Iterator[Document]:
    file = piece.file
    long = piece.long
    if long is None:
        with file.open() as stream:
            raw = stream.read(LONG + 1)
            if len(raw) <= LONG:
                yield from intake.document(0, raw.removeprefix(b"\xef\xbb\xbf"), lambda: file.url)
                return
        del raw
        with file.open() as stream:
            long = measure(stream, sys.maxsize, lambda read: None)
    if long.undecodable is not None:
        # Counted once, with the first range; but all ranges of a dropped document are left out.
        counting = intake if piece.start == 0 else Intake(intake.undecodable, intake.damaged, Report())
        if not counting.keep_undecodable(file.url, long.undecodable):
            return
    size = None if piece.stop is None else piece.stop - piece.start
    yield Document(
        0,
        long.hash,
        long.characters,
        piece.first_character,
        lambda: long_blocks(file.open(seek=piece.start > 0), piece.start, size),
    )


def _read_jsonl(piece: Piece, intake: Intake) -> Iterator[Document]:
    file = piece.file
    with file.open(seek=piece.start > 0) as stream:
        position = piece.start
        if piece.start:  # the line that begins before this range belongs to the range before
            stream.seek(piece.start - 1)
            position += len(stream.readline()) - 1
        while piece.stop is None or position < piece.stop:
            line = stream.readline()
            if not line:
                return
            if position == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield from _jsonl_record(line, position, file, intake)
            position += len(line)


def _jsonl_record(line: bytes, position: int, file: SourceFile, intake: Intake) -> Iterator[Document]:
    def where() -> str:
        return f"{file.url}, line {_line_number(file, position)}"

    content, bad = decode(line)
    if bad is not None and not intake.keep_undecodable(where(), bad):
        return
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        intake.damage(where(), f"not JSON: {error}")
        return
    if not isinstance(record, dict):
        intake.damage(where(), f"a JSON {type(record).__name__} instead of an object")
        return
    if file.text not in record:
        intake.damage(where(), _no_column("key", file, list(record)))
        return
    text = record[file.text]
    if text is not None and not isinstance(text, str):
        intake.damage(where(), f"its '{file.text}' is a {type(text).__name__} instead of a string")
        return
    yield from intake.document(position, (text or "").encode("utf-8", "surrogatepass"), where)


def _line_number(file: SourceFile, position: int) -> int:
    """For messages alone: lines are counted by reading up to the byte offset."""
    with file.open() as stream:
        number = 1
        while position > 0:
            chunk = stream.read(min(position, 1 << 20))
            if not chunk:
                break
            number += chunk.count(b"\n")
            position -= len(chunk)
        return number


def _read_csv(piece: Piece, intake: Intake) -> Iterator[Document]:
    file = piece.file
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts of more than 128 KiB
    delimiter = "\t" if compressed.split_ending(file.path)[0].lower().endswith(".tsv") else ","
    with io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next(rows, None)
        if header is None:
            return
        if file.text not in header:
            raise UserError(f"{file.url}: {_no_column('column', file, header)}")
        column = header.index(file.text)

        def where() -> str:
            return f"{file.url}, line {rows.line_num}"

        for number in itertools.count():
            try:
                row = next(rows, None)
            except csv.Error as error:
                intake.damage(where(), str(error))
                continue
            if row is None:
                return
            if not row:  # a blank line
                continue
            if len(row) <= column:
                intake.damage(where(), f"{len(row)} columns, but '{file.text}' is column {column + 1}")
                continue
            yield from intake.document(number, row[column].encode("utf-8", "surrogateescape"), where)


def _read_parquet(piece: Piece, intake: Intake) -> Iterator[Document]:
    import pyarrow as pa

    file = piece.file
    with file.open(seek=True) as stream:
        table = open_parquet(file, stream, intake)
        if table is None:
            return
        kind = table.schema_arrow.field(file.text).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
            raise UserError(f"{file.url}: column '{file.text}' is {kind}, expected string")
        groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
        position = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in groups:
            following = position + table.metadata.row_group(group).num_rows
            try:
                batches = table.iter_batches(256, row_groups=[group], columns=[file.text], use_threads=False)
                for batch in batches:
                    for value in _values(batch.column(0)):
                        yield from intake.document(position, value, lambda at=position: f"{file.url}, row {at}")  # type: ignore[misc]
                        position += 1
            except (OSError, pa.ArrowException) as error:
                intake.damage(f"{file.url}, row group {group} from row {position} on", " ".join(str(error).split()))
            position = following


def open_parquet(file: SourceFile, stream: BinaryIO, intake: Intake) -> Any:
    """The ``pyarrow.parquet.ParquetFile``, or None when its footer is damaged and may be left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffer makes pyarrow read page by page instead of whole columns of a row group.
        table = pq.ParquetFile(stream, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        intake.damage(file.url, " ".join(str(error).split()))
        return None
    if file.text not in table.schema_arrow.names:
        raise UserError(f"{file.url}: {_no_column('column', file, table.schema_arrow.names)}")
    return table


def _read_dataset(piece: Piece, intake: Intake) -> Iterator[Document]:
    from genscale.data.huggingface import load

    file = piece.file
    dataset = load(file.url, file.split, where=f"data.sources[{file.source}]")
    if file.text not in dataset.column_names:
        raise UserError(f"{file.name}: {_no_column('column', file, dataset.column_names)}")
    dataset = dataset.select_columns([file.text]).with_format("arrow")
    stop = len(dataset) if piece.stop is None else piece.stop
    for start in range(piece.start, stop, 1000):
        rows = dataset[start : min(start + 1000, stop)]
        for position, value in enumerate(_values(rows.column(0)), start):
            yield from intake.document(position, value, lambda at=position: f"{file.name}, row {at}")  # type: ignore[misc]


def _values(column: Any) -> Iterator[bytes]:
    """The UTF-8 (or not) bytes of each value of a column of text; nothing for a null."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    large = pa.types.is_large_string(column.type)
    for value in column.cast(pa.large_binary() if large else pa.binary()).to_pylist():
        yield value or b""


def _no_column(kind: str, file: SourceFile, names: Sequence[str]) -> str:
    return (
        f"no {kind} '{file.text}' (data.sources[{file.source}].text){nearest(file.text, list(names))}"
        f" It has {', '.join(repr(name) for name in names[:8])}"
    )


READERS: dict[str, Callable[[Piece, Intake], Iterator[Document]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "hf": _read_dataset,
}

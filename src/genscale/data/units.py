"""Work units: pieces of the sources of about 16 MB, each of which any worker can read on its own.

What a unit holds depends on the sources alone, and its output on the unit alone; so the number of workers, and where
an earlier attempt was interrupted, never show in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from genscale.data.documents import LongText
from genscale.data.formats import LONG, Intake, Piece, Report, open_parquet
from genscale.data.sources import SourceFile
from genscale.recipe.data import TextData

UNIT = 1 << 24
"""Bytes of source files in a unit, about."""

_FILES = 10_000  # in a unit at most, however small they are
_EXPANSION = 4  # a guess of what a compressed byte becomes


@dataclass(frozen=True)
class Unit:
    number: int
    pieces: tuple[Piece, ...]
    size: int
    """Bytes of the sources, for progress."""
    group: int
    """Number of the first unit that has a part of the same document; its own, but for ranges of a long text."""


def needs_measure(file: SourceFile) -> bool:
    """Whether the file is a long text that can be read in ranges."""
    return file.format == "text" and file.compression is None and file.ranges and (file.size or 0) > LONG


def plan(files: Sequence[SourceFile], measured: dict[int, LongText], data: TextData) -> list[Unit]:
    """The units of these files; ``measured`` has what is known of the long ones, by number in ``files``."""
    units: list[Unit] = []
    pieces: list[Piece] = []
    size = 0

    def close() -> None:
        nonlocal size
        if pieces:
            units.append(Unit(len(units), tuple(pieces), size, len(units)))
            pieces.clear()
            size = 0

    for number, file in enumerate(files):
        if number in measured:
            close()
            first = len(units)
            units += [
                Unit(len(units) + i, (piece,), weight, first)
                for i, (piece, weight) in enumerate(_ranges_of_text(file, measured[number]))
            ]
            continue
        for piece, weight in _split(file, data):
            pieces.append(piece)
            size += weight
            if size >= UNIT or len(pieces) == _FILES:
                close()
    close()
    return units


def _ranges_of_text(file: SourceFile, long: LongText) -> Iterator[tuple[Piece, int]]:
    described = replace(long, cuts=())
    stops = [*(offset for offset, _ in long.cuts[1:]), file.size or 0]
    for (start, first_character), stop in zip(long.cuts, stops, strict=True):
        yield Piece(file, start, stop, described, first_character), stop - start


def _split(file: SourceFile, data: TextData) -> Iterator[tuple[Piece, int]]:
    """A file whole, or in pieces of about the size of a unit, with the bytes in each."""
    size = file.size or 0
    if file.format == "jsonl" and file.compression is None and file.ranges and size > UNIT:
        for start in range(0, size, UNIT):
            yield Piece(file, start, min(start + UNIT, size)), min(UNIT, size - start)
    elif file.format == "parquet" and file.ranges and size > UNIT:
        with file.open(seek=True) as stream:
            table = open_parquet(file, stream, Intake("replace", "drop", Report()))
            sizes = [0] if table is None else [
                table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)
            ]  # fmt: skip
        if table is None:
            yield Piece(file), size
            return
        for start, stop in _runs(sizes, UNIT):
            yield Piece(file, start, stop), size * (stop - start) // len(sizes)
    elif file.format == "hf":
        from genscale.data.huggingface import load

        rows = len(load(file.url, file.split, where=f"data.sources[{file.source}]"))
        step = max(1, rows * UNIT // max(size, 1))
        for start in range(0, rows, step):
            yield Piece(file, start, min(start + step, rows)), size * min(step, rows - start) // rows
    else:
        yield Piece(file), size


def _runs(sizes: Sequence[int], least: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges, each of which sums to ``least`` or is the last."""
    start = total = 0
    for stop, size in enumerate(sizes, 1):
        total += size
        if total >= least or stop == len(sizes):
            yield start, stop
            start, total = stop, 0


def sampled_fraction(files: Sequence[SourceFile], training_bytes: int) -> float:
    """How much of the text to keep for training a tokenizer: twice what is wanted, as far as sizes tell.

    And never so little that chance might leave nothing: texts come in blocks of up to a megabyte.
    """
    total = sum(
        (file.size or 0) * (_EXPANSION if file.compression or file.format == "parquet" else 1) for file in files
    )
    return min(1.0, 2 * max(training_bytes, 1 << 24) / max(total, 1))

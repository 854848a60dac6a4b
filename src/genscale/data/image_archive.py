"""Images in zip and tar files: members of one stem belong together, as in WebDataset.

``cat/0001.jpg`` has the class ``cat`` by its folder; before that comes ``0001.cls`` (a number or a name) or the
``label`` of ``0001.json``. The caption is ``0001.txt``, or the ``caption`` of ``0001.json`` where the recipe names it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from genscale.data import compressed
from genscale.data.image_samples import Intake, Piece, Sample, caption_text, label_name
from genscale.data.image_sources import BESIDE, IMAGES, ImageFile, split_stem


class Member(NamedTuple):
    """An image of an archive, and what stands beside it."""

    name: str
    beside: dict[str, str]
    """Names of members by their ending."""


class BadArchive(Exception):
    """What is wrong with an archive, in words."""


_BAD_MEMBER = (zipfile.BadZipFile, zlib.error, EOFError, BadArchive, NotImplementedError, RuntimeError)


def read_files(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """An image file by itself, with the files beside it."""
    file = piece.file
    with file.open() as stream:
        content = stream.read()
    texts = {}
    for ending, url in file.beside:
        with replace(file, url=url).open() as stream:
            texts[ending] = stream.read()
    yield from described(file, file.path, 0, content, texts, file.url, intake)


def described(
    file: ImageFile, path: str, position: int, content: bytes, texts: Mapping[str, bytes], where: str, intake: Intake
) -> Iterator[Sample]:
    """The sample of an image file's bytes and of what stands beside it, by ending; nothing if that is faulty.

    Args:
        path: of the image within the source; its folder is the class, unless the format is WebDataset's.
    """
    label = caption = None
    try:
        record = json.loads(texts[".json"]) if ".json" in texts else {}
        if not isinstance(record, dict):
            raise ValueError("its .json holds no object")
        if file.label is not None:
            label = label_name(texts[".cls"].decode() if ".cls" in texts else record.get(file.label), ())
            if label is None and file.format != "webdataset":
                label = PurePosixPath(path).parent.name or None
        caption = caption_text(texts.get(".txt", record.get(file.caption) if file.caption else None))
    except ValueError as error:
        intake.bad(where, f"what stands beside it: {error}")
        return
    yield Sample(path, position, content, label, caption)


def read_archive(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """The images of a zip or tar file, or a range of them, in the order of the archive."""
    file = piece.file
    try:
        with _spooled(file) as stream:
            members, read, whole = _zip(stream) if _is_zip(file) else _tar(stream)
            stop = len(members) if piece.stop is None else piece.stop
            for position in range(piece.start, stop):
                member = members[position]
                where = f"{file.url}, {member.name}"
                try:
                    content = read(member.name)
                    texts = {ending: read(name) for ending, name in member.beside.items()}
                except _BAD_MEMBER as error:
                    intake.bad(where, f"damaged: {error}")
                    continue
                # A member's folder is its class as a file's is; the archive's own place tells nothing.
                for sample in described(file, member.name, position, content, texts, where, intake):
                    yield Sample(f"{file.path}/{member.name}", position, sample.content, sample.label, sample.caption)
            if not whole and piece.stop is None:
                intake.bad(file.url, "the archive ends early")
    except (zipfile.BadZipFile, tarfile.TarError, *compressed.DAMAGE) as error:
        intake.bad(file.url, f"the archive is damaged: {error}")


def archive_sizes(file: ImageFile) -> list[int]:
    """Bytes of each image in a local archive that is not compressed as a whole; empty where it is damaged."""
    try:
        with file.open(seek=True) as stream:
            if _is_zip(file):
                with zipfile.ZipFile(stream) as archive:
                    sizes = {info.filename: info.compress_size for info in archive.infolist()}
            else:
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    sizes = {info.name: info.size for info in tar if info.isfile()}
            return [sizes[member.name] for member in group(list(sizes))]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError):
        return []  # whoever reads it will tell


def group(names: list[str]) -> list[Member]:
    """The images among an archive's members, in its order, each with the members beside it."""
    beside: dict[str, dict[str, str]] = {}
    for name in names:
        stem, ending = split_stem(name)
        if ending in BESIDE:
            beside.setdefault(stem, {})[ending] = name
    hidden = ("__MACOSX", ".")  # what a Mac's archiver adds
    return [
        Member(name, beside.get(split_stem(name)[0], {}))
        for name in names
        if split_stem(name)[1] in IMAGES and not any(part.startswith(hidden) for part in name.lstrip("./").split("/"))
    ]


def _is_zip(file: ImageFile) -> bool:
    return compressed.split_ending(file.path)[0].lower().endswith(".zip")


def _spooled(file: ImageFile) -> BinaryIO:
    """The archive, to be read from any place: a compressed one is written out to the disk first."""
    if file.compression is None:
        return file.open(seek=True)
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with file.open() as stream:
        shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy  # type: ignore[return-value]


Opened = tuple[list[Member], Callable[[str], bytes], bool]
"""The images, what reads a member, and whether the list of members is whole."""


def _zip(stream: BinaryIO) -> Opened:
    archive = zipfile.ZipFile(stream)
    return group([info.filename for info in archive.infolist() if not info.is_dir()]), archive.read, True


def _tar(stream: BinaryIO) -> Opened:
    places: dict[str, tuple[int, int]] = {}
    whole = True
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        try:
            for info in tar:
                if info.isfile():
                    places[info.name] = info.offset_data, info.size
        except tarfile.ReadError:  # what comes before the damage can be read
            whole = False

    def read(name: str) -> bytes:
        offset, size = places[name]
        stream.seek(offset)
        content = stream.read(size)
        if len(content) < size:
            raise BadArchive("the archive ends within it")
        return content

    return group(list(places)), read, whole

"""Sources of images: from the paths in a recipe to the files that they name, in an order that never changes.

A new file format is a reader in :mod:`genscale.data.image_formats`; file systems need no code, every URL that fsspec
knows is one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from genscale.data import compressed
from genscale.data.sources import HUGGING_FACE, Entry, File, chosen_entries, find_entries
from genscale.recipe.image_data import ImageSource
from genscale.runtime.errors import UserError

BUILT_IN = "builtin:"

IMAGES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
    | {".pnm", ".tga", ".jp2", ".j2k", ".avif", ".ico", ".icns", ".pcx"}
)
"""Endings of image files."""
BESIDE = (".cls", ".txt", ".json")
"""Endings of what stands beside an image of the same stem: its class, its caption, or both as JSON."""

_FORMATS = {
    ".zip": "archive",
    ".tar": "archive",
    ".tgz": "archive",
    ".tbz2": "archive",
    ".txz": "archive",
    ".npz": "npz",
    ".npy": "npz",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
}
_COMPRESSED_TARS = {".tgz": "gz", ".tbz2": "bz2", ".txz": "xz"}
_IDX = re.compile(r"[.-]idx(\d)(-u?byte)?$")
_SHARD = re.compile(r"\.tfrecords?-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class ImageFile(File):
    """A file of images: its format is ``files``, ``archive``, ``webdataset``, ``idx``, ``npz``, ``parquet``,
    ``tfrecord``, ``digits``, ``csv`` or ``hf``."""

    image: str
    """Column, key or feature that holds the images."""
    label: str | None
    label_named: bool
    """Whether the recipe names the label otherwise than by default, so that it must be there."""
    caption: str | None
    split: str
    labels_file: str | None = None
    """What opens an idx file's labels."""
    classes: tuple[str, ...] = ()
    """Names of the classes by number, where they are known."""
    beside: tuple[tuple[str, str], ...] = ()
    """Of an image file: (ending, what opens it) of the files beside it."""


@dataclass(frozen=True)
class Listing:
    """The files of all sources."""

    files: list[ImageFile]
    left_out: list[dict[str, int]]
    """For each source: how many files of which ending were not taken for images."""


def natural_key(text: str) -> tuple[object, ...]:
    """Sorts ``2.png`` before ``10.png``."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text)))


def list_images(sources: Sequence[ImageSource]) -> Listing:
    """The files of all sources: in the order of the recipe, in natural order of the path within each.

    Raises:
        UserError: there are no sources, or one of them has no images or cannot be reached.
    """
    if not sources:
        raise UserError(
            "data.sources is empty; expected at least one folder, archive, glob, URL, 'hf:NAME' or 'builtin:digits'"
        )
    found = Listing([], [])
    for number, source in enumerate(sources):
        files, left_out = _list_source(number, source)
        found.files.extend(files)
        found.left_out.append(left_out)
    return found


def _list_source(number: int, source: ImageSource) -> tuple[list[ImageFile], dict[str, int]]:
    where = f"data.sources[{number}]"
    if source.path.startswith(BUILT_IN):
        from genscale.data.image_builtin import built_in

        return built_in(number, source), {}
    if source.path.startswith(HUGGING_FACE) or source.format == "hf":
        return [_dataset(number, source)], {}
    entries = chosen_entries(where, source.path, find_entries(where, source.path), source.exclude)
    entries.sort(key=lambda entry: natural_key(entry.path))
    formats = {entry.path: _format_of(entry.path, source.format) for entry in entries}
    if len(entries) == 1 and formats[entries[0].path] is None:
        formats[entries[0].path] = "files"  # named by itself, whatever its ending
    beside: dict[str, list[Entry]] = {split_stem(path)[0]: [] for path, format in formats.items() if format == "files"}
    chosen: list[Entry] = []
    left_out: Counter[str] = Counter()
    for entry in entries:
        stem, ending = split_stem(entry.path)
        if formats[entry.path] is None and ending in BESIDE and stem in beside:
            beside[stem].append(entry)
        elif formats[entry.path] is None:
            left_out[ending or "no ending"] += 1
        elif not (formats[entry.path] == "idx" and "labels" in PurePosixPath(entry.path).name):
            chosen.append(entry)
    if not chosen:
        told = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5)) or "labels alone"
        raise UserError(f"{where}: '{source.path}' holds no images that are known by their ending, but {told}")
    files = [
        _file(number, source, entry, formats[entry.path] or "", beside.get(split_stem(entry.path)[0], []), entries)
        for entry in chosen
    ]
    return files, dict(sorted(left_out.items()))


def _file(
    number: int, source: ImageSource, entry: Entry, format: str, beside: Sequence[Entry], entries: Sequence[Entry]
) -> ImageFile:
    stem, compression = compressed.split_ending(entry.path)
    if format in ("archive", "webdataset"):
        compression = _COMPRESSED_TARS.get(PurePosixPath(stem).suffix.lower(), compression)
    elif format == "files":
        beside, compression = sorted(beside), None
    else:
        beside = []
    return ImageFile(
        source=number,
        name=source.path,
        **entry._replace(version=";".join([entry.version, *(other.version for other in beside)]))._asdict(),
        format=format,
        compression=compression,
        licence=source.licence,
        image=source.image,
        label=source.label,
        label_named=source.label != ImageSource.model_fields["label"].default,
        caption=source.caption,
        split=source.split,
        labels_file=_labels_of(number, source, entry, entries) if format == "idx" else None,
        beside=tuple((split_stem(other.path)[1], other.url) for other in beside),
    )


def split_stem(path: str) -> tuple[str, str]:
    """("a/0001", ".png") for "a/0001.PNG"; what stands beside an image shares all of its name but the last ending."""
    folder, slash, name = path.rpartition("/")
    stem, dot, ending = name.rpartition(".")
    return (folder + slash + stem, dot + ending.lower()) if stem else (path, "")


def _format_of(path: str, given: str) -> str | None:
    """The format by the recipe or by the file's ending; None for what is not known to hold images."""
    name = PurePosixPath(path).name.lower()
    ending = PurePosixPath(name).suffix
    if given != "auto":
        return None if given == "files" and ending in BESIDE else given
    if ending in IMAGES:
        return "files"
    stem, _ = compressed.split_ending(name)
    if _IDX.search(stem):
        return "idx"
    if _SHARD.search(stem):
        return "tfrecord"
    return _FORMATS.get(PurePosixPath(stem).suffix)


def _labels_of(number: int, source: ImageSource, entry: Entry, entries: Sequence[Entry]) -> str | None:
    """What opens the labels of an idx file of images; None where there are none."""
    if source.label is None:
        return None
    if source.labels_file is not None:
        return find_entries(f"data.sources[{number}].labels_file", source.labels_file)[0].url
    folder, slash, name = entry.url.rpartition("/")
    wanted = re.sub(r"images([.-])idx3", r"labels\1idx1", name)
    if wanted == name:
        return None
    plain, _ = compressed.split_ending(wanted)
    for candidate in (wanted, plain, f"{plain}.gz"):
        url = f"{folder}{slash}{candidate}"
        if any(other.url == url for other in entries) or ("://" not in url and Path(url).is_file()):
            return url
    return None


def _dataset(number: int, source: ImageSource) -> ImageFile:
    from genscale.data.huggingface import load

    name = source.path.removeprefix(HUGGING_FACE)
    dataset = load(name, source.split, where=f"data.sources[{number}]")
    return ImageFile(
        source=number,
        name=source.path,
        url=name,
        path=source.split,
        size=dataset.data.nbytes,
        version=dataset._fingerprint,
        ranges=True,
        format="hf",
        compression=None,
        licence=source.licence or dataset.info.license or None,
        image=source.image,
        label=source.label,
        label_named=source.label != ImageSource.model_fields["label"].default,
        caption=source.caption,
        split=source.split,
    )

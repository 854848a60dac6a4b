"""The store of images: pixels, or latents, in files that numpy and pyarrow read by themselves.

    manifest.json             what is here, how it was made, checksums, and one fingerprint for the whole
    images.json               what networks must know: channels, resolution, classes, captions
    documents.parquet         one row for each image: where it came from, its class and caption
    train-00000.npy ...       (images, height, width, channels) uint8, or float16 for latents
    train-labels.npy          (images,) int64, -1 where the class is not known; only where there are classes
    train-captions.npy        (images, tokens) uint16 or uint32, 0 is padding; only where there are captions
    tokenizer.json            of the captions; its ids are stored plus 1
    validation-00000.npy ...  the same for the held-out split

``docs/store.md`` describes the format for those who read it without genscale.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from genscale.data.array_file import ArrayFile, ShardFiles
from genscale.data.description import IMAGES_FILE, TOKENIZER_FILE, ImageDescription, load_description
from genscale.data.image_captions import caption_ids
from genscale.data.manifest import FORMAT, SPLITS, DocumentsTable, StoreFolder, partial_folder, write_manifest
from genscale.data.store import token_dtype
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
            ("id", pa.int64()),  # number of the image in the store, from 0
            ("source", pa.string()),  # the source as the recipe names it
            ("path", pa.string()),  # the file within the source; of an archive, with the member
            ("position", pa.int64()),  # number of the image in its file
            ("licence", pa.string()),
            ("size", pa.int64()),  # bytes of the image as the source holds it
            ("hash", pa.string()),  # blake2b of those bytes, 32 hex digits
            ("pixels", pa.string()),  # blake2b of the pixels at the stored resolution
            ("width", pa.int64()),  # of the image as the source holds it
            ("height", pa.int64()),
            ("class", pa.string()),  # its name; null where it is not known
            ("caption", pa.string()),
            ("split", pa.string()),
            ("index", pa.int64()),  # number of the image in its split
        ]
    )


class ImageStore(StoreFolder):
    """A finished, immutable store of images. Open it with :meth:`ImageStore.open`."""

    kind: ClassVar[str] = "images"
    keys: ClassVar[frozenset[str]] = frozenset({"fingerprint", "dtype", "shape", "splits", "files"})

    @functools.cached_property
    def described(self) -> ImageDescription:
        """What networks must know of the images."""
        self._file(IMAGES_FILE)
        described = load_description(self.path)
        assert isinstance(described, ImageDescription)
        return described

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Of the captions; None where there are none. Stored ids are its ids plus 1."""
        return Tokenizer.load(self._file(TOKENIZER_FILE)) if self.described.caption_vocabulary else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is stored."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    def images(self, split: str) -> int:
        """Number of images in the split."""
        return self._split(split)["images"]

    def labels(self, split: str) -> np.ndarray | None:
        """(images,) int64, memory-mapped: the number of each image's class, -1 where unknown; None without classes."""
        return self._map(f"{split}-labels.npy") if self.described.classes else None

    def captions(self, split: str) -> np.ndarray | None:
        """(images, tokens), memory-mapped: ids of each image's caption plus 1, 0 is padding; None without captions."""
        return self._map(f"{split}-captions.npy") if self.described.caption_vocabulary else None

    def keep_with(self, folder: Path) -> None:
        """Copy into a folder what sampling needs: the description, and the captions' tokenizer."""
        self.described.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FILE)


class ImageStoreWriter:
    """Writes the files of a store of images into a folder, part after part, in bounded memory.

    Args:
        folder: an existing folder; files of an earlier attempt in it are overwritten.
        described: the images; its classes number the names in the rows.
        shard_images: images in each shard but the last.
        tokenizer: of the captions, if there are any.
    """

    def __init__(self, folder: Path, described: ImageDescription, shard_images: int, tokenizer: Tokenizer | None):
        self.folder = folder
        self.described = described
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint8 if described.autoencoder is None else np.float16)
        self.shape = (described.resolution, described.resolution, described.channels)
        self._numbers = {name: number for number, name in enumerate(described.classes)}
        self._shards = {split: ShardFiles(folder, split, self.dtype, shard_images, self.shape) for split in SPLITS}
        self._labels: dict[str, ArrayFile] = {}
        self._captions: dict[str, ArrayFile] = {}
        for split in SPLITS:
            if described.classes:
                self._labels[split] = ArrayFile(folder / f"{split}-labels.npy", np.dtype(np.int64))
            if tokenizer is not None:
                dtype, row = token_dtype(tokenizer.size + 1), (described.caption_tokens,)
                self._captions[split] = ArrayFile(folder / f"{split}-captions.npy", dtype, row)
        self._images = dict.fromkeys(SPLITS, 0)
        self._table = DocumentsTable(folder, documents_schema())

    def add(self, images: Iterable[tuple[str, np.ndarray]], documents: Iterable[pa.Table]) -> None:
        """Append a part: its images, as (split, (images, height, width, channels)) in order, and their rows.

        ``id`` and ``index`` of the rows are set here.
        """
        for table in documents:
            if table.num_rows:
                self._add_documents(table)
        for split, values in images:
            self._shards[split].append(values)

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Close every file, write the manifest last, and return it. ``facts`` are added to the manifest."""
        columns = self._table.finish()
        extra = [*self._labels.values(), *self._captions.values()]
        for file in extra:
            file.finish()
        for split in SPLITS:
            self._shards[split].finish()
            assert self._shards[split].length == self._images[split], "as many images as rows"
        self.described.save(self.folder)
        files = [IMAGES_FILE, *(file.path.name for file in extra)]
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder / TOKENIZER_FILE)
            files.append(TOKENIZER_FILE)
        names = {split: self._shards[split].names for split in SPLITS}
        # The autoencoder's folder is a place; what it does is in the latents.
        identity = {name: value for name, value in asdict(self.described).items() if name != "autoencoder"}
        return write_manifest(
            self.folder,
            [FORMAT, ImageStore.kind, names, identity],
            [*files, *(name for split in SPLITS for name in names[split])],
            columns,
            {
                "kind": ImageStore.kind,
                "dtype": self.dtype.name,
                "shape": list(self.shape),
                "classes": list(self.described.classes),
                "caption_vocabulary": self.described.caption_vocabulary,
                "documents": sum(self._images.values()),
                "splits": {split: {"images": self._images[split], "shards": names[split]} for split in SPLITS},
                **facts,
            },
            without=[IMAGES_FILE],
        )

    def close(self) -> None:
        """Give the store up unfinished."""
        self._table.close()
        for shards in self._shards.values():
            shards.close()
        for file in (*self._labels.values(), *self._captions.values()):
            file.close()

    def _add_documents(self, table: pa.Table) -> None:
        import pyarrow as pa

        splits = np.array(table["split"].to_pylist())
        names, captions = table["class"].to_pylist(), table["caption"].to_pylist()
        first = sum(self._images.values())
        index = np.empty(len(splits), np.int64)
        for split in SPLITS:
            here = np.flatnonzero(splits == split)
            index[here] = self._images[split] + np.arange(len(here))
            self._images[split] += len(here)
            if self._labels:
                numbers = [self._numbers.get(names[row], -1) for row in here.tolist()]
                self._labels[split].append(np.array(numbers, np.int64))
            if self.tokenizer is not None:
                own = [captions[row] for row in here.tolist()]
                self._captions[split].append(caption_ids(self.tokenizer, own, self.described.caption_tokens))
        moved = {"id": pa.array(np.arange(first, first + len(splits))), "index": pa.array(index)}
        schema = documents_schema()
        self._table.add(pa.table({name: moved.get(name, table[name]) for name in schema.names}, schema=schema))


def write_image_store(
    path: str | Path,
    images: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[int] | np.ndarray] | None = None,
    classes: Sequence[str] = (),
    shard_images: int = 100_000,
) -> ImageStore:
    """Make a store from arrays in memory.

    Args:
        path: the store's folder; must not exist.
        images: by split, (images, size, size, channels) uint8.
        labels: by split, (images,) numbers of classes, -1 where unknown.
        classes: their names.
    """
    import pyarrow as pa

    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists; choose another folder or delete it")
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _, resolution, _, channels = next(iter(images.values())).shape
    writer = ImageStoreWriter(partial, ImageDescription(channels, resolution, tuple(classes)), shard_images, None)
    for split, values in images.items():
        rows = []
        for number, pixels in enumerate(values):
            digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()
            label = -1 if labels is None else int(labels[split][number])
            rows.append(
                {
                    "source": "arrays",
                    "path": split,
                    "position": number,
                    "size": pixels.nbytes,
                    "hash": digest,
                    "pixels": digest,
                    "width": resolution,
                    "height": resolution,
                    "class": classes[label] if label >= 0 else None,
                    "split": split,
                }
            )
        writer.add([(split, values)], [pa.Table.from_pylist(rows, schema=documents_schema())])
    writer.finish({})
    os.rename(partial, path)
    sync_folder(path.parent)
    return ImageStore.open(path)

"""From sources of images to a store: list, plan, read and fit, encode latents, put together."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genscale.data.description import ImageDescription
from genscale.data.image_captions import caption_tokenizer
from genscale.data.image_samples import Report
from genscale.data.image_sources import Listing, list_images, natural_key
from genscale.data.image_store import ImageStore, ImageStoreWriter
from genscale.data.image_work import ImageJob, plan
from genscale.data.manifest import SPLITS
from genscale.data.preparation import Progress, data_part, listing, prepare_once, worker_count
from genscale.data.tokenizer import Tokenizer
from genscale.data.unit_output import unit_folder, write_unit
from genscale.data.workers import Workers
from genscale.recipe.image_data import ImageData
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from genscale.data.image_latents import Autoencoder

_CHUNK = 1 << 24  # bytes of images that are copied at once
_WARNINGS = 20  # classes named in warnings


def prepare_images(recipe: Recipe, workers: int | None, progress: Progress) -> ImageStore:
    """Make the recipe's store of images, or return the finished one; see :func:`genscale.data.prepare.prepare`."""
    data = recipe.data
    assert isinstance(data, ImageData)
    store = Path(recipe.store_directory).expanduser()
    progress("listing sources", 0, None, "files")
    found: Listing | None
    try:
        found = list_images(data.sources)
    except UserError:
        # A finished store outlives its sources: it may have been copied to a machine that has none of them.
        if not (store / "manifest.json").exists():
            raise
        found = None
    inputs: dict[str, Any] = {"data": data_part(data)}
    if found is not None:
        inputs["sources"] = listing([source.path for source in data.sources], found.files)
        if data.latents is not None:
            from genscale.data.image_latents import autoencoder_checksum

            inputs["autoencoder"] = autoencoder_checksum(data.latents.autoencoder)

    def make(partial: Path) -> None:
        assert found is not None  # else there is a finished store
        _Preparation(partial, data, found, inputs, workers, progress).run()

    return prepare_once(store, ImageStore, data, inputs, make)


class _Preparation:
    """One attempt at a store, under its lock."""

    def __init__(
        self,
        partial: Path,
        data: ImageData,
        found: Listing,
        inputs: dict[str, Any],
        workers: int | None,
        progress: Progress,
    ):
        self.partial = partial
        self.data = data
        self.found = found
        self.inputs = inputs
        self.workers = workers
        self.progress = progress
        self.units = partial / "units"
        self.latents = partial / "latents"

    def run(self) -> None:
        jobs = plan(self.found.files, self.data, self.units)
        autoencoder = self._autoencoder()
        reports = self._reports(self._read(jobs))
        self._check(reports)
        if autoencoder is not None:
            self._encode(jobs, autoencoder)
        self._assemble(jobs, reports, autoencoder)
        for folder in (self.units, self.latents):
            shutil.rmtree(folder, ignore_errors=True)

    def _autoencoder(self) -> Autoencoder | None:
        """Loaded before the images are read, so that a mistake in it is told at once."""
        if self.data.latents is None:
            return None
        from genscale.data.image_latents import Autoencoder

        autoencoder = Autoencoder.load(self.data.latents.autoencoder)
        autoencoder.check(self.data)
        return autoencoder

    def _read(self, jobs: list[ImageJob]) -> dict[int, Any]:
        sizes = {job.number: job.size for job in jobs}
        done = dict.fromkeys(sizes, 0)
        total = sum(sizes.values())

        def tick(unit: int, count: int) -> None:
            # What is counted in a unit is images, of which a compressed file holds more than its own size.
            done[unit] = min(done[unit] + count, sizes[unit])
            self.progress("reading images", sum(done.values()), total, "bytes")

        self.progress("reading images", 0, total, "bytes")
        with Workers(worker_count(self.found.files, self.workers)) as workers:
            return workers.run(jobs, tick)

    def _reports(self, summaries: dict[int, Any]) -> list[Report]:
        """What became of each source's images."""
        reports = [Report() for _ in self.data.sources]
        for _, summary in sorted(summaries.items()):
            for source, report in summary["reports"].items():
                reports[int(source)].add(report)
        return reports

    def _check(self, reports: list[Report]) -> None:
        """Every source has images, every split has some, and classes are known of all sources or of none."""
        sources = self.data.sources
        for number, (source, report) in enumerate(zip(sources, reports, strict=True)):
            if not report.images:
                first = f", the first is {report.notes[0]}" if report.notes else ""
                raise UserError(
                    f"data.sources[{number}]: '{source.path}' holds no image that can be read ({report.bad} bad{first})"
                )
        labelled = [sum(report.images.values()) > report.unlabelled for report in reports]
        for number, (source, known) in enumerate(zip(sources, labelled, strict=True)):
            if any(labelled) and not known and source.label is not None:
                raise UserError(
                    f"data.sources[{number}]: '{source.path}' has no classes, but "
                    f"'{sources[labelled.index(True)].path}' has; say 'label: null' in the first to learn its images "
                    "without a class, or in the others to learn without classes"
                )
        for split in SPLITS:
            if not any(report.images.get(split, 0) for report in reports):
                count = sum(sum(report.images.values()) for report in reports)
                other = "larger" if split == "validation" else "smaller"
                raise UserError(
                    f"data.split: none of the {count} images falls into the {split} split; "
                    f"use a {other} split.validation than {self.data.split.validation}, or more images"
                )

    def _encode(self, jobs: list[ImageJob], autoencoder: Autoencoder) -> None:
        """The latents of each unit's images, in this process: an accelerator serves one best."""
        latents = self.data.latents
        assert latents is not None
        images = {job.number: sum(self._counts(job).values()) for job in jobs}
        total = sum(images.values())
        done = 0

        def encode(job: ImageJob, folder: Path) -> dict[str, Any]:
            shown = done
            for split in SPLITS:
                with open(folder / f"{split}.images", "wb") as file:
                    for pixels in self._pixels(job, split, latents.batch):
                        file.write(autoencoder.encode(pixels).tobytes())
                        shown += len(pixels)
                        self.progress("encoding latents", shown, total, "images")
            return {}

        self.progress("encoding latents", 0, total, "images")
        for job in jobs:
            write_unit(self.latents, job.number, functools.partial(encode, job))
            done += images[job.number]
            self.progress("encoding latents", done, total, "images")

    def _counts(self, job: ImageJob) -> dict[str, int]:
        """Images of a unit by split."""
        size = self.data.resolution**2 * self.data.channels
        folder = unit_folder(self.units, job.number)
        return {split: (folder / f"{split}.images").stat().st_size // size for split in SPLITS}

    def _pixels(self, job: ImageJob, split: str, count: int) -> Iterator[np.ndarray]:
        """The unit's images of a split, ``count`` at a time: (images, height, width, channels) uint8."""
        shape = (self.data.resolution, self.data.resolution, self.data.channels)
        return _chunks(unit_folder(self.units, job.number) / f"{split}.images", np.dtype(np.uint8), shape, count)

    def _assemble(self, jobs: list[ImageJob], reports: list[Report], autoencoder: Autoencoder | None) -> None:
        """The store's files from the units' outputs, the manifest last."""
        counts = self._class_counts(jobs)
        classes = class_order(counts, reports)
        tokenizer = self._tokenizer(jobs) if any(report.captions for report in reports) else None
        if tokenizer is not None:
            tokenizer.save(self.partial / "tokenizer.json")
        if autoencoder is None:
            channels, resolution = int(self.data.channels), self.data.resolution
        else:
            channels, resolution = autoencoder.shape(self.data.resolution)
        described = ImageDescription(
            channels=channels,
            resolution=resolution,
            classes=tuple(classes),
            caption_vocabulary=tokenizer.size + 1 if tokenizer is not None else 0,
            caption_tokens=self.data.caption_tokens if tokenizer is not None else 0,
            autoencoder=str(autoencoder.folder) if autoencoder is not None else None,
        )
        writer = ImageStoreWriter(self.partial, described, self.data.shard_images, tokenizer)
        folder = self.units if autoencoder is None else self.latents
        count = max(1, _CHUNK // (resolution**2 * channels * writer.dtype.itemsize))
        try:
            for number, job in enumerate(jobs):
                place = unit_folder(folder, job.number)
                images = (
                    (split, chunk)
                    for split in SPLITS
                    for chunk in _chunks(place / f"{split}.images", writer.dtype, writer.shape, count)
                )
                writer.add(images, self._tables(job))
                self.progress("writing the store", number + 1, len(jobs), "units")
            sources = [
                {**described_source, **report.to_dict(), "left_out": left_out}
                for described_source, report, left_out in zip(
                    self.inputs["sources"], reports, self.found.left_out, strict=True
                )
            ]
            writer.finish(
                {
                    "sources": sources,
                    "warnings": warnings_of(counts, classes, reports),
                    "inputs": self.inputs,
                    "libraries": {name: version(name) for name in _LIBRARIES},
                }
            )
        finally:
            writer.close()

    def _tables(self, job: ImageJob) -> Iterator[pa.Table]:
        import pyarrow as pa

        with pa.memory_map(str(unit_folder(self.units, job.number) / "documents.arrow")) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])

    def _class_counts(self, jobs: list[ImageJob]) -> dict[str, Counter[str]]:
        """Images of each class by split; none where no source has classes."""
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for job in jobs:
            for table in self._tables(job):
                grouped = table.group_by(["class", "split"]).aggregate([([], "count_all")]).to_pylist()
                for row in grouped:
                    if row["class"] is not None:
                        counts[row["split"]][row["class"]] += row["count_all"]
        return counts

    def _tokenizer(self, jobs: list[ImageJob]) -> Tokenizer:
        """A BPE of the training split's captions."""

        def captions() -> Iterator[str]:
            for job in jobs:
                for table in self._tables(job):
                    rows = zip(table["split"].to_pylist(), table["caption"].to_pylist(), strict=True)
                    yield from (caption for split, caption in rows if split == "train" and caption)

        self.progress("training the tokenizer", 0, None, "captions")
        return caption_tokenizer(captions(), self.data.caption_vocabulary)


def class_order(counts: dict[str, Counter[str]], reports: list[Report]) -> list[str]:
    """The names of the classes by their number: as the sources declare them, then the others in natural order."""
    found = set().union(*counts.values())
    if not found:
        return []
    declared = list(dict.fromkeys(name for report in reports for name in report.classes))
    return declared + sorted(found - set(declared), key=natural_key)


def warnings_of(counts: dict[str, Counter[str]], classes: list[str], reports: list[Report]) -> list[str]:
    """What a person should know before training on these images."""
    warnings = []
    few = [name for name in classes if sum(count[name] for count in counts.values()) < 2]
    if few:
        warnings.append(f"{len(few)} classes have fewer than two images: {_first(few)}")
    unseen = [name for name in classes if not counts["train"][name] and name not in few]
    if unseen:
        warnings.append(f"{len(unseen)} classes have no image in the training split: {_first(unseen)}")
    unlabelled = sum(report.unlabelled for report in reports)
    if classes and unlabelled:
        warnings.append(f"{unlabelled} images have no class and are learned without one")
    bad = sum(report.bad for report in reports)
    if bad:
        warnings.append(f"{bad} bad images were left out")
    return warnings


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _WARNINGS} more" if len(names) > _WARNINGS else ""
    return ", ".join(names[:_WARNINGS]) + more


def _chunks(file: Path, dtype: np.dtype, shape: tuple[int, ...], count: int) -> Iterator[np.ndarray]:
    """The images of a raw file, ``count`` at a time."""
    size = int(np.prod(shape)) * dtype.itemsize
    with open(file, "rb") as opened:
        while content := opened.read(count * size):
            yield np.frombuffer(content, dtype).reshape(-1, *shape)


_LIBRARIES = ("genscale", "numpy", "pyarrow", "pillow")

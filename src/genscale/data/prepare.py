"""From sources to a store: list, plan, survey, train the tokenizer, tokenise, put together.

Everything is done in ``<store>.partial``, which is renamed to ``<store>`` when it is whole. A killed preparation goes
on from the work units that were finished; the same inputs give the same store, bit by bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.documents import LongText
from genscale.data.encoding import unit_outputs
from genscale.data.formats import Piece, Report
from genscale.data.sources import SourceFile, list_files
from genscale.data.store import SPLITS, Store, StoreWriter, partial_folder, token_dtype
from genscale.data.tokenizer import END_OF_DOCUMENT_NAMES, Tokenizer, character_tokenizer, train_bpe
from genscale.data.units import UNIT, Job, Unit, needs_measure, plan, sampled_fraction
from genscale.data.workers import Workers, disk_full, is_disk_full
from genscale.recipe.data import TextData
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum, sync_folder, write_atomically

Progress = Callable[[str, int, int | None, str], None]
"""Called with (stage, done, total or None, unit)."""

_SMALL = 8 << 20  # bytes of sources that are not worth a process of their own


def prepare(recipe: Recipe, workers: int | None = None, on_progress: Progress | None = None) -> Store:
    """Make the recipe's store, or return the finished one that was made from the same inputs.

    Args:
        recipe: its ``data`` says what goes in, its ``store_directory`` where the store is.
        workers: processes; by default one for each core. The store does not depend on it.
        on_progress: called with (stage, done, total or None, unit) as the work goes on.

    Raises:
        UserError: a source is missing, empty or faulty; the store was made from other inputs; another process is
            preparing it; the disk is full.
    """
    data = recipe.data
    store = Path(recipe.store_directory).expanduser()
    progress = on_progress or (lambda stage, done, total, unit: None)
    progress("listing sources", 0, None, "files")
    files: list[SourceFile] | None
    try:
        files = list_files(data.sources)
    except UserError:
        # A finished store outlives its sources: it may have been copied to a machine that has none of them.
        if not (store / "manifest.json").exists():
            raise
        files = None
    tokenizer = _given_tokenizer(data) if files is not None else None
    inputs = _inputs(data, files)
    finished = _finished_store(store, inputs)
    if finished is not None:
        return finished
    assert files is not None
    try:
        with _lock(store):
            finished = _finished_store(store, inputs)
            if finished is not None:
                return finished
            return _Preparation(store, data, files, inputs, workers, progress).run(tokenizer)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(partial_folder(store)) from None
        if isinstance(error, PermissionError):
            raise UserError(f"data.store: cannot write to {error.filename}: {error.strerror}") from None
        raise


def _given_tokenizer(data: TextData) -> Tokenizer | None:
    """The tokenizer of the recipe, if it is a file."""
    if data.tokenizer.kind != "file":
        return None
    tokenizer = Tokenizer.load(data.tokenizer.path, data.tokenizer.end_of_document)
    if tokenizer.end_of_document is None:
        raise UserError(
            f"{data.tokenizer.path} has none of the tokens {', '.join(END_OF_DOCUMENT_NAMES)}; "
            "name the one that ends a document in data.tokenizer.end_of_document"
        )
    return tokenizer


def _inputs(data: TextData, files: Sequence[SourceFile] | None) -> dict[str, Any]:
    """What the store is a function of: the recipe's data part, and what tells the source files from others."""
    part = data.model_dump(mode="json", exclude={"store", "mixture"})
    if files is None:
        return {"data": part}
    sources: list[dict[str, Any]] = []
    for number, source in enumerate(data.sources):
        own = [file for file in files if file.source == number]
        listing = json.dumps([[file.path, file.size, file.version] for file in own])
        sources.append(
            {
                "path": source.path,
                "files": len(own),
                "bytes": sum(file.size or 0 for file in own),
                "listing": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
            }
        )
    inputs = {"data": part, "sources": sources}
    if data.tokenizer.kind == "file":
        inputs["tokenizer"] = checksum(Path(data.tokenizer.path).expanduser())
    return inputs


def _finished_store(path: Path, inputs: dict[str, Any]) -> Store | None:
    """The store, if it is finished and made from these inputs."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / "manifest.json").exists():
        raise UserError(f"data.store: {path} exists and is not a store; choose another data.store or delete it")
    store = Store.open(path)
    different = _difference(store.manifest.get("inputs", {}), inputs)
    if different:
        raise UserError(
            f"the store {path} was made from other inputs: {different}; choose another data.store or delete that folder"
        )
    return store


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first difference, in words; the empty string if there is none."""
    before, now = dict(_leaves(old.get("data"), "data")), dict(_leaves(new["data"], "data"))
    for key in [*now, *(key for key in before if key not in now)]:
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
    for was, has in zip(old.get("sources", []), new.get("sources", []), strict=False):
        if was != has:
            if was["files"] == has["files"] and was["bytes"] == has["bytes"]:
                return f"files of the source '{has['path']}' were modified or renamed since"
            return (
                f"the source '{has['path']}' had {was['files']} files of {was['bytes']} bytes, "
                f"has {has['files']} files of {has['bytes']} bytes"
            )
    if "sources" in new and old.get("tokenizer") != new.get("tokenizer"):
        return f"the tokenizer file {new['data']['tokenizer']['path']} was changed since"
    return ""


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    else:
        yield key, value


@contextlib.contextmanager
def _lock(store: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when that process ends, however it ends."""
    store.parent.mkdir(parents=True, exist_ok=True)
    file = store.with_name(f".{store.name}.lock")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"another process (pid {holder}) is preparing the store {store}; wait until it has finished"
            ) from None
        if file.exists() and os.path.samestat(file.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # its holder removed the file after we opened it
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


class _Preparation:
    """One attempt at a store, under its lock."""

    def __init__(
        self,
        store: Path,
        data: TextData,
        files: list[SourceFile],
        inputs: dict[str, Any],
        workers: int | None,
        progress: Progress,
    ):
        self.store = store
        self.partial = partial_folder(store)
        self.data = data
        self.files = files
        self.inputs = inputs
        self.progress = progress
        size = sum(file.size or 0 for file in files)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = max(1, cores if workers is None else workers)
        if size < _SMALL or any(file.url.startswith("memory://") for file in files):
            count = 0  # files in this process's memory are nowhere else
        self.workers = Workers(count)

    def run(self, tokenizer: Tokenizer | None) -> Store:
        self._open_partial()
        with self.workers:
            units = plan(self.files, self._measure(), self.data)
            if tokenizer is None:
                tokenizer = self._make_tokenizer(units)
            file = self.partial / "tokenizer.json"
            if not file.exists():
                tokenizer.save(file)
            summaries = self._run("encode", units, "tokenising", file, tokenizer.end_of_document_token)
        reports = self._reports(summaries)
        self._check_split(reports)
        manifest = self._assemble(tokenizer, units, reports, summaries)
        for folder in ("survey", "encode"):
            shutil.rmtree(self.partial / folder, ignore_errors=True)
        (self.partial / "inputs.json").unlink()
        os.rename(self.partial, self.store)
        sync_folder(self.store.parent)
        return Store(self.store, manifest)

    def _open_partial(self) -> None:
        """Go on in the folder of an earlier attempt from the same inputs, else begin afresh."""
        file = self.partial / "inputs.json"
        content = json.dumps(self.inputs, sort_keys=True)
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            write_atomically(file, content)
        for aside in self.partial.glob("*/.[0-9]*"):
            shutil.rmtree(aside, ignore_errors=True)

    def _measure(self) -> dict[int, LongText]:
        """One pass over each long text, for its hash and for where to cut it."""
        numbers = [number for number, file in enumerate(self.files) if needs_measure(file)]
        units = [Unit(number, (Piece(self.files[number]),), self.files[number].size or 0, number) for number in numbers]
        return self._run("measure", units, "measuring long texts") if units else {}

    def _make_tokenizer(self, units: list[Unit]) -> Tokenizer:
        """Survey the sources and make the tokenizer that the recipe asks for."""
        file = self.partial / "tokenizer.json"
        if file.exists():
            return Tokenizer.load(file)
        summaries = self._run("survey", units, "surveying text")
        self._check_split(self._reports(summaries))
        wanted = self.data.tokenizer
        if wanted.kind == "characters":
            characters = set().union(*(summary["characters"] for summary in summaries.values()))
            tokenizer = character_tokenizer(characters, wanted.end_of_document)
        else:
            assert wanted.kind == "bpe"
            folders = [self.partial / "survey" / f"{unit.number:06d}" for unit in units]
            tokenizer = train_bpe(self._training_text(folders, wanted.training_bytes), wanted.vocabulary)
        tokenizer.save(file)
        shutil.rmtree(self.partial / "survey")
        return tokenizer

    def _training_text(self, folders: list[Path], training_bytes: int) -> Iterator[str]:
        """The surveyed text of the highest priority, at most ``training_bytes`` of it."""
        import pyarrow as pa
        import pyarrow.compute as pc

        def batches() -> Iterator[pa.RecordBatch]:
            for folder in folders:
                with pa.memory_map(str(folder / "text.arrow")) as source:
                    table = pa.ipc.open_file(source)
                    for number in range(table.num_record_batches):
                        yield table.get_batch(number)

        priorities = np.concatenate([batch["priority"].to_numpy() for batch in batches()] or [np.zeros(0)])
        sizes = np.concatenate([pc.binary_length(batch["text"]).to_numpy() for batch in batches()] or [np.zeros(0)])
        order = np.argsort(priorities, kind="stable")
        before = np.cumsum(sizes[order]) - sizes[order]
        taken = np.zeros(len(order), np.int64)  # bytes of each block; of the last one chosen, its beginning
        taken[order] = np.clip(training_bytes - before, 0, sizes[order])
        done, total, row = 0, int(taken.sum()), 0
        for batch in batches():
            for number in np.flatnonzero(taken[row : row + len(batch)]).tolist():
                size = int(taken[row + number])
                yield batch["text"][number].as_py().encode()[:size].decode(errors="ignore")
                done += size
                self.progress("training the tokenizer", done, total, "bytes")
            row += len(batch)

    def _run(
        self,
        task: str,
        units: list[Unit],
        stage: str,
        tokenizer: Path | None = None,
        end_of_document: str | None = None,
    ) -> dict[int, Any]:
        wanted = self.data.tokenizer
        sampled = sampled_fraction(self.files, wanted.training_bytes) if wanted.kind == "bpe" else 0.0
        folder = self.partial / task
        jobs = [Job(task, unit, self.data, folder, tokenizer, end_of_document, UNIT, sampled) for unit in units]
        sizes = {unit.number: unit.size for unit in units}
        done = dict.fromkeys(sizes, 0)
        total = sum(sizes.values())

        def tick(unit: int, count: int) -> None:
            # What is counted in a unit is text, of which a compressed file holds more than its own size.
            done[unit] = min(done[unit] + count, sizes[unit])
            self.progress(stage, sum(done.values()), total, "bytes")

        self.progress(stage, 0, total, "bytes")
        return self.workers.run(jobs, tick)

    def _reports(self, summaries: dict[int, Any]) -> list[Report]:
        """What became of each source's documents."""
        reports = [Report() for _ in self.data.sources]
        for _, summary in sorted(summaries.items()):
            for source, report in summary["reports"].items():
                reports[int(source)].add(report)
        return reports

    def _check_split(self, reports: list[Report]) -> None:
        for source, report in zip(self.data.sources, reports, strict=True):
            if not any(counts["documents"] for counts in report.splits.values()):
                left_out = [
                    f"{count} {name}"
                    for name, count in (
                        ("empty documents", report.empty),
                        ("undecodable documents dropped", report.dropped),
                        ("damaged parts dropped", report.damaged),
                    )
                    if count
                ]
                raise UserError(
                    f"the source '{source.path}' holds no text" + (f" ({', '.join(left_out)})" if left_out else "")
                )
        for split in SPLITS:
            if not any(report.splits.get(split, {}).get("documents", 0) for report in reports):
                count = sum(counts["documents"] for report in reports for counts in report.splits.values())
                other = "larger" if split == "validation" else "smaller"
                raise UserError(
                    f"data.split: none of the {count} documents falls into the {split} split; "
                    f"use split.by=tail or a {other} split.validation than {self.data.split.validation}"
                )

    def _assemble(
        self, tokenizer: Tokenizer, units: list[Unit], reports: list[Report], summaries: dict[int, Any]
    ) -> dict[str, Any]:
        """The store's files from the units' outputs, the manifest last."""
        writer = StoreWriter(self.partial, tokenizer, self.data.shard_tokens)
        try:
            dtype = token_dtype(tokenizer.size)
            total = len({unit.group for unit in units})
            for number, (tokens, tables) in enumerate(unit_outputs(self.partial / "encode", units, dtype)):
                writer.add(tokens, tables)
                self.progress("writing the store", number + 1, total, "units")
            sources = [
                {**described, **report.to_dict()}
                for described, report in zip(self.inputs["sources"], reports, strict=True)
            ]
            encoders = sorted({summary["encoder"] for summary in summaries.values()})
            return writer.finish(
                {
                    "sources": sources,
                    "inputs": self.inputs,
                    "encoder": ", ".join(encoders),
                    "libraries": {name: version(name) for name in _LIBRARIES},
                }
            )
        finally:
            writer.close()


_LIBRARIES = ("genscale", "numpy", "pyarrow", "tokenizers", "fastokens", "rustbpe")

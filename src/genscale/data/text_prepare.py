"""From sources of text to a store: list, plan, survey, train the tokenizer, tokenise, put together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.documents import LongText
from genscale.data.encoding import unit_outputs
from genscale.data.formats import Piece, Report
from genscale.data.preparation import Progress, data_part, listing, prepare_once, worker_count
from genscale.data.sources import SourceFile, list_files
from genscale.data.store import SPLITS, Store, StoreWriter, token_dtype
from genscale.data.tokenizer import END_OF_DOCUMENT_NAMES, Tokenizer, character_tokenizer, train_bpe
from genscale.data.units import UNIT, Unit, needs_measure, plan, sampled_fraction
from genscale.data.work import Job
from genscale.data.workers import Workers
from genscale.recipe.data import TextData
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum


def prepare_text(recipe: Recipe, workers: int | None, progress: Progress) -> Store:
    """Make the recipe's store of tokens, or return the finished one; see :func:`genscale.data.prepare.prepare`."""
    data = recipe.data
    assert isinstance(data, TextData)
    store = Path(recipe.store_directory).expanduser()
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

    def make(partial: Path) -> None:
        assert files is not None  # else there is a finished store
        _Preparation(partial, data, files, inputs, workers, progress).run(tokenizer)

    return prepare_once(store, Store, data, inputs, make)


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
    if files is None:
        return {"data": data_part(data)}
    inputs = {"data": data_part(data), "sources": listing([source.path for source in data.sources], files)}
    if data.tokenizer.kind == "file":
        inputs["tokenizer"] = checksum(Path(data.tokenizer.path).expanduser())
    return inputs


class _Preparation:
    """One attempt at a store, under its lock."""

    def __init__(
        self,
        partial: Path,
        data: TextData,
        files: list[SourceFile],
        inputs: dict[str, Any],
        workers: int | None,
        progress: Progress,
    ):
        self.partial = partial
        self.data = data
        self.files = files
        self.inputs = inputs
        self.progress = progress
        self.workers = Workers(worker_count(files, workers))

    def run(self, tokenizer: Tokenizer | None) -> None:
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
        self._assemble(tokenizer, units, reports, summaries)
        for folder in ("survey", "encode"):
            shutil.rmtree(self.partial / folder, ignore_errors=True)

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
    ) -> None:
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
            writer.finish(
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

"""Checkpoints: what a run needs to go on after any interruption.

One checkpoint is a folder, ``step-00000100``, that appears by a rename when all of it is on the disk:

    rank-00000.safetensors   each rank's tensors, readable by any safetensors reader
    index.json               where the chunks of each tensor lie, with a blake2b checksum of each
    facts.json               the step, whether it is the best, and the loop's own state
    checksums.json           the checksums of the two files before

Nothing but the folders says which checkpoint is the last or the best, so no second file can disagree with them after a
crash. A checkpoint whose checksums do not hold is passed over for the one before it. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.tensor import DTensor

from genscale.runs.disk import writing
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum, sync_folder, write_atomically
from genscale.training import tensor_file
from genscale.training.checkpoint_storage import Index, Planner, Reader, Staging, Writer, dtype_and_shape
from genscale.training.tensor_file import DamagedFile

# One process without a process group is what most runs are; DCP warns of it on every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

Saved = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The types and shapes of a checkpoint's tensors, by name."""

_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
_ASIDE = re.compile(r"\.step-\d{8,}\.aside(-old)?")


@dataclass(frozen=True)
class Checkpoint:
    """What :meth:`CheckpointStore.load` gives back."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    """One line for each newer checkpoint that was damaged and passed over; the caller logs them."""


class CheckpointStore:
    """The checkpoints of one run.

    Under a process group every rank makes the store and calls its methods, all in the same order; the folder is one
    that all ranks see. Only one process, or group, may save to a folder at a time (the run's lock sees to that); any
    other may load from it meanwhile.

    Args:
        folder: where checkpoints lie; made by the first save.
        keep_last: number of newest checkpoints that are kept.
        keep_every: steps; the first checkpoint at or after each multiple of it is kept for good.
        alone: one process uses it, whatever others there are.

    Attributes:
        pause_seconds: how long training was held up by the last save.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int | None = None, alone: bool = False):
        self.folder = Path(folder)
        self.pause_seconds = 0.0
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None
        if not alone and dist.is_available() and dist.is_initialized():
            # A group of our own, so that the background thread's messages never mix with training's.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._rank = dist.get_rank(self._group) if self._group else 0

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], best: bool = False, wait: bool = False
    ) -> None:
        """Save in the background; returns as soon as the tensors may change again.

        Checkpoints of later steps, left from before the run went back, are removed. Raises what went wrong in the save
        before, such as a UserError for a full disk.

        Args:
            tensors: plain tensors, alike on all ranks, or DTensors; on any device.
            facts: anything that JSON holds.
            best: this is the best one so far; it is kept until a better one comes.
            wait: return only when the checkpoint is on the disk.
        """
        begun = time.perf_counter()
        self.wait()
        record = json.dumps({"step": step, "best": best, "facts": dict(facts)})  # now: the caller may change them
        planner = self._staging.plan(dict(tensors), self._group)
        self._pending = self._thread.submit(self._write, step, planner, record, best)
        if wait:
            self.wait()
        self.pause_seconds = time.perf_counter() - begun

    def wait(self) -> None:
        """Wait for the save that is under way; raises what went wrong in it. Call it at the end of a run."""
        if self._pending is None:
            return
        try:
            with writing(self.folder):
                _first_failure(self._pending.result)
        finally:
            if self._pending.done():  # Ctrl-C ends the waiting, not the writing, which still needs its buffers
                self._pending = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return [step for step in self._folders() if (self._path(step) / "checksums.json").is_file()]

    def is_empty(self) -> bool:
        """Whether there is no checkpoint at all, not even a damaged one."""
        return self._on_rank_0(lambda: not self._folders())

    def best(self) -> int | None:
        """The step of the newest checkpoint that was saved as the best."""
        return max((step for step in self.steps() if self._is_best(step)), default=None)

    def load(
        self,
        which: int | Literal["last", "best"] = "last",
        names: Callable[[str], bool] | None = None,
        into: dict[str, Tensor] | Callable[[Saved], dict[str, Tensor]] | None = None,
    ) -> Checkpoint:
        """Load a checkpoint; a damaged one is passed over for the one before it, with a warning.

        Args:
            which: a step, the last or the best. A step that was asked for by number is never replaced by another.
            names: chooses the tensors; nothing of the others is read.
            into: fill these tensors in place, on their device and in their layout, instead of making new ones on the
                CPU; or what makes them of the types and shapes that were saved. Loading then fits any number of ranks,
                whatever number saved.

        Raises UserError when no intact checkpoint is left, KeyError for a name in ``into`` that was not saved, and
        ValueError for one of another shape.
        """
        self.wait()
        found: list[str] = []
        passed_over: set[int] = set()
        while (step := self._candidate(which, passed_over)) is not None:
            passed_over.add(step)
            damage = None
            try:
                index, record = self._read_index(step)
                tensors = self._targets(index, names, into)
                _first_failure(partial(self._read, Reader(self._path(step), index), tensors))
            except (DamagedFile, OSError) as error:
                damage = error
            if damage is None:
                warnings = [f"{damaged}; looking for the one before it" for damaged in found]
                return Checkpoint(step, tensors, record["facts"], warnings)
            # One that a training process has just retired is not damaged, it is gone: look again, without a word.
            if self._on_rank_0(self._path(step).exists):
                found.append(f"checkpoint {self._path(step)} is damaged ({damage})")
        wanted = f"of step {which}" if isinstance(which, int) else f"({which} was asked for)"
        if isinstance(which, int):
            found.append(f"there are {', '.join(map(str, sorted(set(self.steps()) - passed_over))) or 'none'}")
        raise UserError("; ".join([f"no intact checkpoint {wanted} in {self.folder}", *found]))

    # Which one

    def _path(self, step: int) -> Path:
        path = self.folder / f"step-{step:08d}"
        replaced = path.with_name(path.name + ".replaced")  # stays if we are killed just before the new one appears
        return replaced if replaced.exists() and not path.exists() else path

    def _folders(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted({int(match[1]) for path in self.folder.iterdir() if (match := _FOLDER.fullmatch(path.name))})

    def _is_best(self, step: int) -> bool:
        with suppress(OSError, ValueError):
            return json.loads((self._path(step) / "facts.json").read_text())["best"] is True
        return False

    def _candidate(self, which: int | str, passed_over: set[int]) -> int | None:
        """The next checkpoint to try: the newest, among the best ones first when the best is asked for."""

        def choose() -> int | None:
            steps = [step for step in self._folders() if step not in passed_over]
            if isinstance(which, int):
                steps = [step for step in steps if step == which]
            if which == "best":
                steps = [step for step in steps if self._is_best(step)] or steps
            return max(steps, default=None)

        return self._on_rank_0(choose)

    def _on_rank_0(self, ask: Callable[[], Any]) -> Any:
        """Rank 0's answer, on all ranks, so that they never disagree about what is on the disk."""
        if self._group is None:
            return ask()
        answer = [ask() if self._rank == 0 else None]
        dist.broadcast_object_list(answer, src=dist.get_global_rank(self._group, 0), group=self._group)
        return answer[0]

    # Reading

    def _read_index(self, step: int) -> tuple[Index, dict[str, Any]]:
        def check() -> tuple[Index, dict[str, Any]] | str:
            folder = self._path(step)
            try:
                sums = json.loads((folder / "checksums.json").read_text())
                for name in ("index.json", "facts.json"):
                    if sums[name] != checksum(folder / name):
                        return f"{name} does not have the checksum that was recorded"
                return json.loads((folder / "index.json").read_text()), json.loads((folder / "facts.json").read_text())
            except OSError as error:
                return f"{Path(error.filename or folder).name}: {error.strerror}"
            except (ValueError, KeyError, TypeError):
                return "checksums.json cannot be read"

        answer = self._on_rank_0(check)
        if isinstance(answer, str):
            raise DamagedFile(answer)
        return answer

    def _read(self, reader: Reader, tensors: dict[str, Tensor]) -> None:
        distributed_checkpoint.load(
            tensors,
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=self._group,
            no_dist=self._group is None,
        )

    def _targets(
        self,
        index: Index,
        names: Callable[[str], bool] | None,
        into: dict[str, Tensor] | Callable[[Saved], dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        if callable(into):
            into = into({name: dtype_and_shape(index, name) for name in index})
        if into is not None:
            missing = sorted(set(into) - set(index))
            if missing:
                raise KeyError(f"{self.folder} has no tensor '{missing[0]}'")
            return {name: tensor for name, tensor in into.items() if names is None or names(name)}
        tensors = {}
        for name in index:
            if names is None or names(name):
                dtype, shape = dtype_and_shape(index, name)
                tensors[name] = torch.empty(shape, dtype=dtype)
        return tensors

    # Writing, in the background thread; what rank 0 does alone runs inside DCP's steps, so that all learn of a failure

    def _write(self, step: int, planner: Planner, record: str, best: bool) -> None:
        aside = self.folder / f".step-{step:08d}.aside"
        try:
            distributed_checkpoint.save(
                {},  # the planner has the tensors
                storage_writer=Writer(
                    aside,
                    self._rank,
                    begin=self.remove_leftovers,
                    commit=lambda index: self._commit(step, aside, index, record, best),
                ),
                planner=planner,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk needs its space back
            raise

    def _commit(self, step: int, aside: Path, index: Index, record: str, best: bool) -> None:
        """Make the checkpoint appear, then retire what is not kept. A kill between any two lines loses nothing."""
        write_atomically(aside / "index.json", json.dumps(index))
        write_atomically(aside / "facts.json", record)
        sums = {name: checksum(aside / name) for name in ("index.json", "facts.json")}
        write_atomically(aside / "checksums.json", json.dumps(sums))
        sync_folder(aside)
        for later in self._folders():
            if later > step:  # of a time that the run has gone back from
                self._retire(later)
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            shutil.rmtree(path.with_name(path.name + ".replaced"), ignore_errors=True)
            os.rename(path, path.with_name(path.name + ".replaced"))
        os.rename(aside, path)
        sync_folder(self.folder)
        kept = self._kept(best)
        for other in self._folders():
            if other not in kept:
                self._retire(other)
        shutil.rmtree(path.with_name(path.name + ".replaced"), ignore_errors=True)

    def _kept(self, newest_is_best: bool) -> set[int]:
        steps = self.steps()
        kept = set(steps[-self._keep_last :])
        best = steps[-1] if newest_is_best else self.best()
        if best is not None:
            kept.add(best)
        if self._keep_every is not None:
            before = 0
            for step in steps:
                if step // self._keep_every > before // self._keep_every:
                    kept.add(step)
                before = step
        return kept

    def _retire(self, step: int) -> None:
        """Rename first, so that a half-deleted checkpoint never looks whole."""
        while (path := self._path(step)).exists():
            old = self.folder / f".step-{step:08d}.aside-old"
            os.rename(path, old)
            shutil.rmtree(old)

    def remove_leftovers(self) -> None:
        """What a killed process left half-written or half-deleted. On rank 0, and only for a process that saves."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            replaced = path.suffix == ".replaced"
            if _ASIDE.fullmatch(path.name) or (replaced and path.with_suffix("").exists()):
                shutil.rmtree(path)
            elif replaced:
                os.rename(path, path.with_suffix(""))


def _first_failure(do: Callable[[], None]) -> None:
    """DCP wraps what went wrong on any rank; raise the thing itself, on every rank."""
    try:
        do()
    except CheckpointException as wrapped:
        error, _ = wrapped.failures[min(wrapped.failures)]
        raise error from None


def export_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, alone: bool = False
) -> None:
    """Write plain safetensors, atomically. Under a process group every rank calls it, and rank 0 writes.

    Args:
        alone: this process calls it, whatever others there are.
        metadata: kept in the file's header: the recipe's name, the step.
    """
    rank = dist.get_rank() if not alone and dist.is_available() and dist.is_initialized() else 0
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if rank == 0:
            whole[name] = full.cpu()
    if rank == 0:
        aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                tensor_file.write(aside, whole, metadata)
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)

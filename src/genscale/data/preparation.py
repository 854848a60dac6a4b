"""What preparing a store means, whatever it holds: once, by one process at a time, aside, from known inputs.

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
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from genscale.data.manifest import StoreFolder, partial_folder
from genscale.data.sources import File
from genscale.data.workers import disk_full, is_disk_full
from genscale.recipe.base import Part
from genscale.runtime.errors import UserError
from genscale.runtime.files import sync_folder, write_atomically

Progress = Callable[[str, int, int | None, str], None]
"""Called with (stage, done, total or None, unit)."""

_SMALL = 8 << 20  # bytes of sources that are not worth a process of their own

_NOT_INPUTS = {"store", "mixture"}  # keys of the data part that change nothing in a store
_GIVEN = {
    "tokenizer": ("the tokenizer file", "data.tokenizer.path"),
    "autoencoder": ("the autoencoder", "data.latents.autoencoder"),
}
"""Files that a recipe may give, whose checksums are inputs: what they are called, and the key that names them."""

AnyStore = TypeVar("AnyStore", bound=StoreFolder)


def prepare_once(
    store: Path, kind: type[AnyStore], data: Part, inputs: dict[str, Any], make: Callable[[Path], object]
) -> AnyStore:
    """The finished store of these inputs, or the one that ``make`` makes in the partial folder that it is given.

    Raises:
        UserError: the store was made from other inputs; another process is preparing it; the disk is full; what
            ``make`` raises.
    """
    finished = _finished_store(store, kind, data, inputs)
    if finished is not None:
        return finished
    partial = partial_folder(store)
    try:
        with locked(store):
            finished = _finished_store(store, kind, data, inputs)
            if finished is not None:
                return finished
            _open_partial(partial, inputs)
            make(partial)
            (partial / "inputs.json").unlink()
            os.rename(partial, store)
            sync_folder(store.parent)
            return kind.open(store)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(partial) from None
        if isinstance(error, PermissionError):
            raise UserError(f"data.store: cannot write to {error.filename}: {error.strerror}") from None
        raise


def data_part(data: Part) -> dict[str, Any]:
    """The recipe's data part, as far as the store is a function of it."""
    return data.model_dump(mode="json", exclude=_NOT_INPUTS)


def listing(paths: Sequence[str], files: Sequence[File]) -> list[dict[str, Any]]:
    """For each source, by its path in the recipe: how many files, bytes, and a digest that tells them from others."""
    sources: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        own = [file for file in files if file.source == number]
        content = json.dumps([[file.path, file.size, file.version] for file in own])
        sources.append(
            {
                "path": path,
                "files": len(own),
                "bytes": sum(file.size or 0 for file in own),
                "listing": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            }
        )
    return sources


def worker_count(files: Sequence[File], wanted: int | None) -> int:
    """Processes to read these files with: as many as wanted, by default one for each core; 0 is this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sum(file.size or 0 for file in files) < _SMALL or any(file.url.startswith("memory://") for file in files):
        return 0  # files in this process's memory are nowhere else
    return max(1, cores if wanted is None else wanted)


def _finished_store(path: Path, kind: type[AnyStore], data: Part, inputs: dict[str, Any]) -> AnyStore | None:
    """The store, if it is finished and made from these inputs."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / "manifest.json").exists():
        raise UserError(f"data.store: {path} exists and is not a store; choose another data.store or delete it")
    store = kind.open(path)
    was = store.manifest.get("inputs", {})
    different = _difference({**was, "data": _as_today(was.get("data"), type(data))}, inputs)
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
    if "sources" in new:
        for name, (told, key) in _GIVEN.items():
            if old.get(name) != new.get(name):
                return f"{told} {now[key]} was changed since"
    return ""


def _as_today(part: Any, kind: type[Part]) -> Any:
    """The data part of an older store, with the keys that recipes have got since at their defaults."""
    try:
        return data_part(kind.model_validate(part))
    except ValidationError:  # of a store from a newer version, or of another kind
        return part


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    else:
        yield key, value


def _open_partial(partial: Path, inputs: dict[str, Any]) -> None:
    """Go on in the folder of an earlier attempt from the same inputs, else begin afresh."""
    file = partial / "inputs.json"
    content = json.dumps(inputs, sort_keys=True)
    if not file.exists() or file.read_text(encoding="utf-8") != content:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_atomically(file, content)
    for aside in partial.glob("*/.[0-9]*"):
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
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

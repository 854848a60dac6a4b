"""Checkpoints that are damaged, or whose writing fails or is killed."""

import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from checkpoints import content, cut, flip_a_byte, same, saved

from genscale.runtime.errors import UserError
from genscale.training import checkpoint_storage
from genscale.training.checkpoint import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's own filter


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def change(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGE = {
    "a flipped bit in a tensor": lambda folder: flip_a_byte(folder, "model.weight"),
    "a truncated file": lambda folder: cut(folder / "rank-00000.safetensors"),
    "a missing file": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "missing checksums": lambda folder: (folder / "checksums.json").unlink(),
    "truncated checksums": lambda folder: cut(folder / "checksums.json"),
    "checksums of another form": lambda folder: (folder / "checksums.json").write_text("[1]"),
    "a missing index": lambda folder: (folder / "index.json").unlink(),
    "a changed index": lambda folder: change(folder / "index.json", b"BF16", b"FP16"),
    "changed facts": lambda folder: change(folder / "facts.json", b'"samples": 192', b'"samples": 193'),
    "an empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_a_damaged_checkpoint_is_used_with_a_warning(tmp_path, damage):
    store = saved(tmp_path, [1, 2, 3])
    DAMAGE[damage](tmp_path / "step-00000003")
    loaded = store.load("last")
    assert loaded.step == 2
    assert same(loaded.tensors, content(2))
    assert loaded.facts == {"samples": 128}
    assert len(loaded.warnings) == 1
    assert "step-00000003 is damaged" in loaded.warnings[0]
    assert "\n" not in loaded.warnings[0]
    with pytest.raises(UserError, match=r"no intact checkpoint of step 3 .*; there are 1, 2"):
        store.load(3)


def test_the_run_goes_on_over_a_damaged_checkpoint(tmp_path):
    saved(tmp_path, [1, 2, 3])
    flip_a_byte(tmp_path / "step-00000003", "model.bias")
    saved(tmp_path, [3])
    loaded = CheckpointStore(tmp_path).load()
    assert (loaded.step, loaded.warnings) == (3, [])
    assert same(loaded.tensors, content(3))


def test_when_none_is_intact_it_says_so(tmp_path):
    with pytest.raises(UserError, match="no intact checkpoint"):
        CheckpointStore(tmp_path / "nowhere").load()
    store = saved(tmp_path, [1, 2])
    for step in (1, 2):
        cut(tmp_path / f"step-0000000{step}" / "rank-00000.safetensors")
    with pytest.raises(UserError, match=r"step-00000002 is damaged .*is cut short.*step-00000001 is damaged"):
        store.load()


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    store = saved(tmp_path / "c", [1, 2])
    newest = tmp_path / "c" / "step-00000002"
    attack = pickle.dumps(Malicious())
    for name in (".metadata", "__0_0.distcp", "rank-00001.safetensors"):  # beside the real files
        (newest / name).write_bytes(attack)
    assert store.load().step == 2
    for path in newest.iterdir():  # in place of each
        whole = path.read_bytes()
        path.write_bytes(attack)
        assert store.load().step in (1, 2)
        path.write_bytes(whole)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for target in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(target, refuse)
    assert same(store.load(2).tensors, content(2))
    assert not marker.exists()


# Failures and kills


def test_a_full_disk_surfaces_at_the_next_call_and_leaves_the_last_one_whole(tmp_path):
    store = saved(tmp_path, [1])
    write = checkpoint_storage.write

    def full(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_storage, "write", full)
        store.save(2, content(2), {})
        with pytest.raises(UserError, match=r"cannot write .*: the disk is full"):
            store.save(3, content(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    store.save(3, content(3), {}, wait=True)
    assert store.steps() == [1, 3]


def test_another_failure_surfaces_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_storage, "write", lambda *_: 1 / 0)
    store = CheckpointStore(tmp_path)
    store.save(1, content(1), {})
    with pytest.raises(ZeroDivisionError):
        store.wait()
    store.wait()


def test_a_store_that_only_reads_leaves_a_writers_work_alone(tmp_path):
    saved(tmp_path, [1])
    aside = tmp_path / ".step-00000002.aside"
    aside.mkdir()
    assert CheckpointStore(tmp_path).load().step == 1
    assert aside.exists()
    saved(tmp_path, [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def killed(child: object, *arguments: object) -> bool:
    """Run ``child`` in a fork; whether it was killed."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            child(*arguments)  # type: ignore[operator]
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def kill_at_call(number: int) -> None:
    """Be killed just before the ``number``-th call that changes anything on the disk."""
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def test_a_kill_before_any_change_on_the_disk_loses_nothing_and_the_end_is_the_same(tmp_path):
    """One checkpoint is kept, the cruellest case. The new one is the best, and is then saved once more."""

    def child(folder: Path, number: int) -> None:
        kill_at_call(number)
        store = CheckpointStore(folder, keep_last=1)
        store.save(3, content(3), {"samples": 3}, best=True)
        store.save(3, content(3), {"samples": 3}, best=True, wait=True)

    store = CheckpointStore(tmp_path / "before", keep_last=1)
    store.save(1, content(1), {"samples": 1}, best=True)
    store.save(2, content(2), {"samples": 2}, wait=True)
    last = set()
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", folder)
        finished = not killed(child, folder, number)
        for which in ("last", "best"):
            loaded = CheckpointStore(folder).load(which)
            assert loaded.warnings == []
            assert same(loaded.tensors, content(loaded.step))
            assert loaded.facts == {"samples": loaded.step}
            last.add((which, loaded.step))
        store = CheckpointStore(folder, keep_last=1)
        for step in range(store.load().step + 1, 5):
            store.save(step, content(step), {"samples": step}, best=step == 3)
        store.wait()
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
        assert store.best() == 3
        assert same(store.load("last").tensors, content(4))
        assert same(store.load("best").tensors, content(3))
        if finished:
            break
    assert number > 40
    assert last == {("last", 2), ("last", 3), ("best", 1), ("best", 3)}


def test_kills_at_random_moments_always_leave_an_intact_last_checkpoint(tmp_path):
    def child() -> None:
        store = CheckpointStore(tmp_path, keep_last=2)
        step = store.load().step if store.steps() else 0
        while True:
            step += 1
            store.save(step, content(step), {"samples": step}, best=step % 5 == 1)

    reached = [0]
    dice = random.Random(0)
    for _ in range(10):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            child()
        deadline = time.monotonic() + 30
        store = CheckpointStore(tmp_path)
        while max(store.steps(), default=0) <= reached[-1] and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        loaded = store.load("last")
        assert loaded.warnings == []
        assert loaded.step > reached[-1]
        assert same(loaded.tensors, content(loaded.step))
        assert loaded.facts == {"samples": loaded.step}
        assert store.best() is not None
        assert len(store.steps()) <= 4
        reached.append(loaded.step)


def test_another_process_may_load_while_checkpoints_come_and_go(tmp_path):
    saved(tmp_path, [1], keep_last=1)
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        store = CheckpointStore(tmp_path, keep_last=1)
        step = 1
        while True:
            step += 1
            store.save(step, content(step), {"samples": step})
    try:
        steps = set()
        until = time.monotonic() + 1
        while time.monotonic() < until or len(steps) < 3:
            loaded = CheckpointStore(tmp_path).load()
            assert loaded.warnings == []
            assert same(loaded.tensors, content(loaded.step))
            steps.add(loaded.step)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

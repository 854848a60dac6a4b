import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from genscale.runtime.errors import UserError
from genscale.training import checkpoint_storage
from genscale.training.checkpoint import CheckpointStore, export_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's own filter


def content(step: int) -> dict[str, Tensor]:
    """A state that can be told to be that of ``step``, and of no other."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(64, 32, generator=generator),
        "model.bias": torch.full((32,), step, dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(float(step)),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits (nan is equal to itself, 0.0 is not -0.0)."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        == b[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        for name in a
    )


def saved(folder: Path, steps: list[int], **options: int) -> CheckpointStore:
    store = CheckpointStore(folder, **{"keep_last": 10, **options})
    for step in steps:
        store.save(step, content(step), {"samples": step * 64})
    store.wait()
    return store


def test_every_type_and_shape_comes_back_to_the_bit(tmp_path):
    tensors = {
        "fp32": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45]),
        "fp64": torch.tensor([[0.1], [1 / 3]], dtype=torch.float64),
        "bf16": torch.randn(5, 3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "int32": torch.tensor([-5], dtype=torch.int32),
        "uint8": torch.arange(13, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.1),
        "scalar_int64": torch.tensor(2**53 + 1),
        "scalar_bf16": torch.tensor(0.1).bfloat16(),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 5).t(),
        "view": torch.randn(100)[10:20:2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "name@with,odd/characters é": torch.ones(1),
    }
    store = CheckpointStore(tmp_path)
    store.save(7, tensors, {"loss": 0.1 + 0.2, "best": None, "skipped": [1, 2]})
    loaded = store.load()
    assert same(loaded.tensors, tensors)
    assert (loaded.step, loaded.facts, loaded.warnings) == (7, {"loss": 0.1 + 0.2, "best": None, "skipped": [1, 2]}, [])


def test_any_safetensors_reader_opens_the_file(tmp_path):
    saved(tmp_path, [3])
    assert same(load_file(tmp_path / "step-00000003" / "rank-00000.safetensors"), content(3))


def test_saving_does_not_wait_for_the_disk_and_keeps_the_state_of_the_call(tmp_path, monkeypatch):
    gate = threading.Event()
    write = checkpoint_storage.write
    monkeypatch.setattr(checkpoint_storage, "write", lambda *arguments: (gate.wait(20), write(*arguments))[1])
    store = CheckpointStore(tmp_path)
    tensors, facts = content(1), {"skipped": [1]}
    store.save(1, tensors, facts)
    assert 0 < store.pause_seconds < 5
    for tensor in tensors.values():
        tensor.zero_()
    facts["skipped"].append(2)
    assert store.steps() == []
    gate.set()
    loaded = store.load()
    assert same(loaded.tensors, content(1))
    assert loaded.facts == {"skipped": [1]}


def test_an_interrupted_wait_does_not_spoil_what_is_being_written(tmp_path, monkeypatch):
    gate = threading.Event()
    write = checkpoint_storage.write
    monkeypatch.setattr(checkpoint_storage, "write", lambda *arguments: (gate.wait(20), write(*arguments))[1])
    store = CheckpointStore(tmp_path)
    store.save(1, content(1), {})
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        store.wait()
    threading.Timer(0.1, gate.set).start()
    store.save(2, content(2), {}, wait=True)
    assert same(store.load(1).tensors, content(1))
    assert same(store.load(2).tensors, content(2))


def test_wait_returns_when_the_checkpoint_is_there(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, content(5), {}, wait=True)
    assert CheckpointStore(tmp_path).steps() == [5]


def test_states_that_change_shape_between_saves_are_staged_anew(tmp_path):
    store = CheckpointStore(tmp_path)
    for step, size in enumerate((4, 9, 2), start=1):
        store.save(step, {"a": torch.arange(size)}, {})
    assert store.load(3).tensors["a"].tolist() == [0, 1]
    assert store.load(2).tensors["a"].tolist() == list(range(9))


def test_what_is_not_a_tensor_is_refused_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match="'step' is not a tensor"):
        store.save(1, {"step": 3}, {})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="JSON"):
        store.save(1, content(1), {"tensor": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_loaded_without_reading_the_rest(tmp_path):
    store = saved(tmp_path, [1, 2])
    flip_a_byte(tmp_path / "step-00000002", "optimizer.step")
    loaded = store.load(names=lambda name: name.startswith("model."))
    assert loaded.step == 2
    assert same(loaded.tensors, {name: tensor for name, tensor in content(2).items() if name.startswith("model.")})
    assert store.load().step == 1


def test_loading_into_tensors_fills_them_in_place(tmp_path):
    store = saved(tmp_path, [4])
    network = torch.nn.Linear(64, 32)
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    loaded = store.load(into={"model.weight": weight, "optimizer.step": torch.zeros(())})
    assert loaded.tensors["model.weight"] is weight
    assert torch.equal(weight.detach(), content(4)["model.weight"])
    assert loaded.tensors["optimizer.step"].item() == 4
    with pytest.raises(KeyError, match=r"no tensor 'model\.head'"):
        store.load(into={"model.head": torch.zeros(1)})
    with pytest.raises(ValueError, match="Size mismatch"):
        store.load(into={"model.weight": network.weight})


# Damage


def flip_a_byte(folder: Path, name: str) -> None:
    chunk = json.loads((folder / "index.json").read_text())[name]["chunks"][0]
    path = folder / chunk["file"]
    data = bytearray(path.read_bytes())
    data[chunk["start"] + chunk["bytes"] - 1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


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


# Which are kept


def test_the_last_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in range(1, 8):
        store.save(step, content(step), {}, best=step in (1, 3))
    store.wait()
    assert store.steps() == [3, 6, 7]
    assert store.best() == 3
    assert store.load("best").step == 3
    store.save(8, content(8), {}, best=True, wait=True)
    assert store.steps() == [7, 8]
    assert CheckpointStore(tmp_path).best() == 8


def test_the_first_after_each_multiple_is_kept_for_good(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_every=100)
    for step in range(30, 500, 30):
        store.save(step, {"a": torch.tensor(step)}, {})
    store.wait()
    assert store.steps() == [120, 210, 300, 420, 480]


def test_going_back_removes_what_came_after(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (10, 20, 30):
        store.save(step, content(step), {}, best=step == 30)
    assert store.load(10).step == 10
    store.save(15, content(15), {})
    store.wait()
    assert store.steps() == [10, 15]
    assert store.best() is None
    assert store.load("last").step == 15


def test_without_a_best_one_the_newest_stands_in(tmp_path):
    assert saved(tmp_path, [1, 2]).load("best").step == 2


def test_a_damaged_best_is_passed_over_with_a_warning(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in range(1, 6):
        store.save(step, content(step), {}, best=step in (2, 4))
    store.wait()
    cut(tmp_path / "step-00000004" / "rank-00000.safetensors")
    loaded = store.load("best")
    assert (loaded.step, len(loaded.warnings)) == (2, 1)


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


# Weights to take away


def test_exported_weights_are_plain_safetensors_with_their_origin(tmp_path):
    path = tmp_path / "weights" / "model.safetensors"
    tied = torch.randn(4, 4)
    tensors = {**content(3), "embedding": tied, "head": tied}
    export_weights(path, tensors, {"recipe": "tiny", "step": "3"})
    assert same(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "tiny", "step": "3"}
    assert os.listdir(path.parent) == ["model.safetensors"]

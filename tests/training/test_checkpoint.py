"""Checkpoints: what is saved comes back, and which are kept."""

import os
import signal
import threading

import pytest
import torch
from checkpoints import content, cut, flip_a_byte, same, saved
from safetensors import safe_open
from safetensors.torch import load_file

from genscale.training import checkpoint_storage
from genscale.training.checkpoint import CheckpointStore, export_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's own filter


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

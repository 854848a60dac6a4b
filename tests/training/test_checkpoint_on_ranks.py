"""Real processes on gloo: what is saved on one number of ranks is loaded on another, to the bit."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # DTensor imports it on first use: once here, not in every fork
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from genscale.runtime.errors import UserError
from genscale.training import checkpoint_storage
from genscale.training.checkpoint import CheckpointStore, export_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def on_ranks(size: int, job: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Run ``job(rank, folder, ...)`` on forked processes under a process group; fails when any of them does."""
    meeting = folder / f"meeting-{job.__name__}-{size}"
    processes = []
    for rank in range(size):
        process = os.fork()
        if process == 0:
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
                job(rank, folder, *arguments)
                dist.barrier()
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert codes == [0] * size


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "even": torch.randn(8, 6, generator=generator),
        "uneven": torch.randn(5, 3, generator=generator).bfloat16(),
        "smaller than the ranks": torch.arange(1),
        "columns": torch.randn(3, 9, generator=generator),
        "replicated": torch.arange(10, dtype=torch.uint8),
        "plain": torch.randn(4, generator=generator),
        "scalar": torch.tensor(2**53 + 1),
    }


DIMENSIONS = {"even": 0, "uneven": 0, "smaller than the ranks": 0, "columns": 1}


def distributed(tensors: dict[str, Tensor], size: int, fill: bool = True) -> dict[str, Tensor]:
    """Each tensor as DIMENSIONS say, on a line of ranks, or on two lines that hold the same where there are four."""
    mesh = init_device_mesh("cpu", (2, 2) if size == 4 else (size,))
    here: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor if fill else torch.zeros_like(tensor)
        if name in DIMENSIONS:
            placements = [Replicate()] * (mesh.ndim - 1) + [Shard(DIMENSIONS[name])]
            here[name] = distribute_tensor(tensor, mesh, placements)
        elif name == "replicated":
            here[name] = distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)
        else:
            here[name] = tensor
    return here


def save(rank: int, folder: Path, size: int) -> None:
    store = CheckpointStore(folder / "checkpoints", keep_last=2)
    for step in (1, 2):
        scaled = {name: tensor * step for name, tensor in whole().items()}
        store.save(step, distributed(scaled, size), {"samples": step}, best=step == 1)
    store.wait()
    assert store.steps() == [1, 2]
    weights = {name: tensor for name, tensor in distributed(whole(), size).items() if name in DIMENSIONS}
    export_weights(folder / "weights.safetensors", weights)


def load(rank: int, folder: Path, size: int, step: int, damaged: int) -> None:
    tensors = distributed(whole(), size, fill=False)
    loaded = CheckpointStore(folder / "checkpoints").load("last", into=tensors)
    assert (loaded.step, loaded.facts, len(loaded.warnings)) == (step, {"samples": step}, damaged)
    for name, tensor in whole().items():
        found = loaded.tensors[name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor * step), name


@pytest.mark.parametrize(("saving", "loading"), [(2, 3), (4, 2)])
def test_what_some_ranks_save_any_other_number_loads(tmp_path, saving, loading):
    on_ranks(saving, save, tmp_path, saving)
    single = CheckpointStore(tmp_path / "checkpoints").load("last")
    assert single.step == 2
    assert single.tensors.keys() == whole().keys()
    for name, tensor in whole().items():
        assert single.tensors[name].dtype == tensor.dtype
        assert torch.equal(single.tensors[name], tensor * 2), name
    on_ranks(loading, load, tmp_path, loading, 2, 0)

    newest = tmp_path / "checkpoints" / "step-00000002"
    sizes = [path.stat().st_size for path in sorted(newest.glob("rank-*"))]
    assert len(sizes) == saving
    data = sum(tensor.nbytes for tensor in whole().values())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in newest.glob("rank-*"))
    assert sum(sizes) == data + headers  # what several ranks hold alike is written once

    from safetensors.torch import load_file

    weights = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(weights[name], whole()[name]) for name in DIMENSIONS)

    rank_1 = newest / "rank-00001.safetensors"  # damaged where only some ranks read: all go back together
    rank_1.write_bytes(rank_1.read_bytes()[:-1])
    on_ranks(saving, load, tmp_path, saving, 1, 1)


def fail_on_one_rank(rank: int, folder: Path) -> None:
    store = CheckpointStore(folder / "checkpoints")
    store.save(1, distributed(whole(), 2), {}, wait=True)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint_storage, "write", full)
        store.save(2, distributed(whole(), 2), {})
        with pytest.raises(UserError, match="the disk is full"):
            store.wait()
    assert store.load().step == 1
    partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    with pytest.raises(ValueError, match="'loss' is a partial sum"):
        store.save(3, {"loss": partial}, {})


def test_a_failure_on_one_rank_is_known_to_all(tmp_path):
    on_ranks(2, fail_on_one_rank, tmp_path)


def save_stages(rank: int, folder: Path) -> None:
    """Pipeline stages: each rank has tensors of its own beside the common ones."""
    tensors = {"common": torch.arange(5), f"stage.{rank}": torch.full((3,), rank)}
    CheckpointStore(folder / "checkpoints").save(1, tensors, {}, wait=True)


def test_ranks_may_hold_tensors_of_their_own(tmp_path):
    on_ranks(2, save_stages, tmp_path)
    tensors = CheckpointStore(tmp_path / "checkpoints").load().tensors
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "common": [0, 1, 2, 3, 4],
        "stage.0": [0, 0, 0],
        "stage.1": [1, 1, 1],
    }

"""Real processes on gloo: known collectives give exactly the known bytes along the known axes, whoever calls them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks, codes
from torch import distributed, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from genscale.parallel.traffic import Traffic, axes_of, measured_traffic

RANKS = 4
ONE_RANK = "import runpy; runpy.run_path({file!r})['run_rank']({folder!r})"


def sent(do: Callable[[], object], mesh: DeviceMesh) -> list[tuple[str, str, int, int]]:
    with measured_traffic(axes_of(mesh)) as traffic:
        do()
    return sorted(tuple(row) for row in traffic.table())


def plain_collectives(mesh: DeviceMesh) -> None:
    outer, inner = mesh["outer"].get_group(), mesh["inner"].get_group()

    def step() -> None:
        distributed.all_reduce(torch.ones(100), group=outer)
        work = distributed.all_reduce(torch.ones(50, dtype=torch.bfloat16), group=outer, async_op=True)
        work.wait()
        distributed.all_reduce(torch.ones(10))
        distributed.all_gather([torch.empty(6) for _ in range(2)], torch.ones(6), group=inner)
        distributed.broadcast(torch.ones(8), src=distributed.get_global_rank(inner, 0), group=inner)
        distributed.barrier()

    assert sent(step, mesh) == [
        ("all_gather", "inner", 1, 24),
        ("all_reduce", "all", 1, 60),
        ("all_reduce", "outer", 2, 400 + 100),
        ("barrier", "all", 1, 0),
        ("broadcast", "inner", 1, 16),
    ]


def from_one_rank_to_another(mesh: DeviceMesh) -> None:
    """As a pipeline does, one by one and in batches; only what is sent counts."""
    group = mesh["outer"].get_group()
    place = mesh["outer"].get_local_rank()
    peer = distributed.get_global_rank(group, 1 - place)

    def step() -> None:
        if place == 0:
            distributed.send(torch.ones(30), peer, group=group)
        else:
            distributed.recv(torch.ones(30), peer, group=group)
        operations = [
            distributed.P2POp(distributed.isend, torch.ones(7), peer, group),
            distributed.P2POp(distributed.irecv, torch.empty(7), peer, group),
        ]
        for work in distributed.batch_isend_irecv(operations):
            work.wait()

    assert sent(step, mesh) == [("send", "outer", 2, 148) if place == 0 else ("send", "outer", 1, 28)]


def between_experts(mesh: DeviceMesh) -> None:
    """Even and uneven, with the backward."""
    group, place = mesh["inner"].get_group(), mesh["inner"].get_local_rank()

    def even() -> None:
        x = torch.ones(8, requires_grad=True)
        functional.all_to_all_single_autograd(x, [4, 4], [4, 4], group).sum().backward()

    assert sent(even, mesh) == [("all_to_all", "inner", 2, 2 * 16)]
    gives = [[1, 5], [2, 3]][place]
    takes = [[1, 2], [5, 3]][place]

    def uneven() -> None:
        out, x = torch.empty(sum(takes), 10), torch.ones(sum(gives), 10)
        distributed.all_to_all_single(out, x, takes, gives, group=group)

    assert sent(uneven, mesh) == [("all_to_all", "inner", 1, 40 * gives[1 - place])]


def fully_sharded(mesh: DeviceMesh) -> None:
    """FSDP2: weights are gathered in the forward and again in the backward, gradients are scattered."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh["inner"], reshard_after_forward=True)
    fully_shard(net, mesh=mesh["inner"])
    whole = 4 * (64 * 128 + 128 + 128 * 64 + 64)

    def step() -> None:
        net(torch.ones(4, 64)).sum().backward()

    expected = [("all_gather", "inner", 4, whole), ("reduce_scatter", "inner", 2, whole // 2)]
    assert sent(step, mesh) == expected
    assert sent(step, mesh) == expected


def both_copied_and_sharded(mesh: DeviceMesh) -> None:
    """FSDP2 over two axes: the gradients' shards are summed over the copies."""
    net = nn.Linear(64, 128)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    whole = 4 * (64 * 128 + 128)
    assert sent(lambda: net(torch.ones(4, 64)).sum().backward(), mesh) == [
        ("all_gather", "inner", 2, whole),
        ("all_reduce", "outer", 1, whole // 2),
        ("reduce_scatter", "inner", 1, whole // 2),
    ]


def tensor_parallel(mesh: DeviceMesh) -> None:
    """DTensors: one sum forward, and one backward where the input has a gradient."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    parallelize_module(net, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def step() -> None:
        net(torch.ones(4, 64, requires_grad=True)).sum().backward()

    assert sent(step, mesh) == [("all_reduce", "inner", 2, 2 * 4 * 4 * 64)]


def waiting(mesh: DeviceMesh) -> None:
    """Ranks 1 to 3 wait for the first one, however they wait."""
    rank = distributed.get_rank()

    def gone_async() -> None:
        work = distributed.all_reduce(torch.ones(1), async_op=True)
        work.wait()

    waits: list[Callable[[], object]] = [
        lambda: distributed.all_reduce(torch.ones(1)),
        gone_async,
        lambda: functional.all_reduce(torch.ones(1), "sum", distributed.group.WORLD) + 1,
    ]
    for wait in waits:
        distributed.barrier()
        with measured_traffic({}) as traffic:
            if rank == 0:
                time.sleep(0.3)
            wait()
        assert traffic.seconds >= 0.25
        assert traffic.waiting_seconds is not None
        assert (traffic.waiting_seconds > 0.15) == (rank != 0)
        assert traffic.waiting == traffic.waiting_seconds / traffic.seconds <= 1


def nothing_is_left_behind(mesh: DeviceMesh) -> None:
    before = distributed.Work.wait, functional.AsyncCollectiveTensor.trigger_wait
    with pytest.raises(ZeroDivisionError), measured_traffic({}) as traffic:
        1 / 0  # noqa: B018
    assert before == (distributed.Work.wait, functional.AsyncCollectiveTensor.trigger_wait)
    distributed.all_reduce(torch.ones(1))
    assert traffic.table() == []


CASES: list[Callable[[DeviceMesh], None]] = [
    plain_collectives,
    from_one_rank_to_another,
    between_experts,
    fully_sharded,
    both_copied_and_sharded,
    tensor_parallel,
    waiting,
    nothing_is_left_behind,
]


def run_rank(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    failed = {}
    for case in CASES:
        try:
            case(mesh)
        except Exception:
            failed[case.__name__] = traceback.format_exc()
    torch.save(failed, Path(folder) / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong on each rank, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = Ranks(ONE_RANK.format(file=__file__, folder=str(folder)), RANKS).end(60)
    assert codes(ended) == [0] * RANKS, ended
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_four_ranks(failed: list[dict[str, str]], case: str) -> None:
    for found in failed:
        assert case not in found, found[case]


def test_one_process_sends_nothing() -> None:
    with measured_traffic({}) as traffic:
        torch.ones(3).sum()
    assert isinstance(traffic, Traffic)
    assert traffic.facts() == {"sent": [], "bytes": 0, "seconds": traffic.seconds, "waiting_seconds": 0.0}

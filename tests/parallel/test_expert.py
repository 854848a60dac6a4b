"""Real processes on gloo: experts on several ranks, and sequences cut over ranks, give what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import Ranks, codes
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from genscale.models.mixture import MixtureFeedForward, begin_step, loads
from genscale.parallel.expert import expert_slice, split_experts
from genscale.recipe.mixture import Mixture
from genscale.runtime.errors import UserError

WIDTH, HIDDEN, EXPERTS, BATCH, TIME = 8, 12, 8, 7, 5
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6}
SIZES = {2: (7, 0), 4: (2, 0, 4, 1)}
"""Sequences of each rank; there is one that has none."""
CASES = {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "DTensors": {"sharded": True},
    "recompute": {"recompute": True},
    "an expert that gets no tokens": {"avoided": (3,)},
    "a rank that gets no tokens": {"avoided": range(4, 8)},
}
ONE_RANK = "import runpy; runpy.run_path({file!r})['run_rank']({folder!r})"


def layer_of(dtype: torch.dtype = torch.float64, avoided: tuple[int, ...] = ()) -> MixtureFeedForward:
    """The first number of each token is 1: there the router can be told what to avoid."""
    torch.manual_seed(0)
    options = Mixture(experts=EXPERTS, active=2, shared=1, balance_weight=0.5, z_loss=0.1)
    layer = MixtureFeedForward(WIDTH, HIDDEN, options).to(dtype)
    with torch.no_grad():
        layer.router.weight[list(avoided), 0] -= 100
    return layer


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Tokens, and the gradient of the loss by the output."""
    draws = torch.Generator().manual_seed(1)
    x, slope = (torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64, generator=draws) for _ in range(2))
    x[..., 0] = 1
    return x.to(dtype), slope.to(dtype)


def one_step(layer: MixtureFeedForward, x: Tensor, slope: Tensor, recompute: bool = False) -> dict[str, Tensor]:
    """Two forwards and backwards of the same; the output, the load, and all gradients."""
    begin_step(layer, 1 / BATCH)
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.backward(slope)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": y.detach(), "input": x.grad, "load": loads(layer)[0]} | found


def experts_on_ranks(rank: int, size: int, sharded: bool, recompute: bool, **options: object) -> dict[str, Tensor]:
    layer = layer_of(**options)
    group = distributed.group.WORLD
    for name, stack in list(layer.experts.named_parameters()):
        if sharded:
            local = distribute_tensor(stack.detach(), init_device_mesh("cpu", (size,)), [Shard(0)])
        else:
            local = stack.detach()[expert_slice(EXPERTS, group)].clone()
        setattr(layer.experts, name, nn.Parameter(local))
    split_experts(layer, group)
    x, slope = (part.split(SIZES[size])[rank] for part in batch(layer.router.weight.dtype))
    found = one_step(layer, x, slope, recompute)
    return {name: value.full_tensor() if sharded and "experts" in name else value for name, value in found.items()}


class _SumOverRanks(torch.autograd.Function):
    """A sum whose gradient is the sum of the gradients: each rank goes on with the result."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


def sequence_on_ranks(rank: int, size: int) -> dict[str, Tensor]:
    """Of five tokens, two ranks have 3 and 2, and four 2, 1, 1 and 1."""
    layer = layer_of()
    layer.sum_over_sequence = _SumOverRanks.apply
    return one_step(layer, *(part.tensor_split(size, dim=1)[rank] for part in batch()))


def mistake() -> str:
    try:
        expert_slice(EXPERTS + 1, distributed.group.WORLD)
    except UserError as error:
        return str(error)
    return "none"


def run_rank(folder: str) -> None:
    """All cases in one group of processes, whose start takes longer than they do."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    found = {"sequence": sequence_on_ranks(rank, size), "mistake": mistake()}
    for case, options in CASES.items():
        found[case] = experts_on_ranks(rank, size, **{"sharded": False, "recompute": False, **options})
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank found."""
    size, folder = request.param, str(tmp_path_factory.mktemp("ranks"))
    ended = Ranks(ONE_RANK.format(file=__file__, folder=folder), size).end(seconds=60)
    assert codes(ended) == [0] * size, ended
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def assert_equal(found: list[dict[str, Tensor]], expected: dict[str, Tensor], dim: int, whole: tuple[str, ...]) -> None:
    """Outputs lie side by side along ``dim``, weights in ``whole`` by experts; other gradients and loads are summed."""
    limit = LIMITS[expected["output"].dtype]
    for name, value in expected.items():
        parts = [part[name] for part in found]
        if name in ("output", "input"):
            got = torch.cat(parts, dim)
        else:
            got = torch.cat(parts) if name in whole else torch.stack(parts).sum(0)
        torch.testing.assert_close(got, value, atol=limit * max(1, value.abs().max().item()), rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_experts_on_ranks_equal_one_process(ranks: list[dict], case: str) -> None:
    options = {key: value for key, value in CASES[case].items() if key in ("dtype", "avoided")}
    layer = layer_of(**options)
    expected = one_step(layer, *batch(layer.router.weight.dtype))
    for expert in options.get("avoided", ()):
        assert expected["load"][expert] == 0
    found = [rank[case] for rank in ranks]
    names = tuple(name for name in expected if name.startswith("experts."))
    if case == "DTensors":  # each rank has put the whole together
        found = [{k: v / len(ranks) if k in names else v for k, v in rank.items()} for rank in found]
        names = ()
    assert_equal(found, expected, 0, names)


def test_a_sequence_cut_over_ranks_has_the_same_auxiliary_losses(ranks: list[dict]) -> None:
    expected = one_step(layer_of(), *batch())
    assert_equal([rank["sequence"] for rank in ranks], expected, 1, ())


def test_experts_that_ranks_cannot_share_evenly_are_refused(ranks: list[dict]) -> None:
    for rank in ranks:
        assert f"{len(ranks)} ranks cannot share the {EXPERTS + 1} experts" in rank["mistake"]

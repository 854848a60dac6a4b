"""Groups that train apart, against closed forms: alone where one process is enough, else as real processes on gloo."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from ranks import Ranks, codes
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from genscale.parallel.shards import local, whole
from genscale.recipe.low_communication import LowCommunication
from genscale.training.checkpoint import CheckpointStore
from genscale.training.low_communication import OuterOptimizer, by_group, fragments_of

RANKS, GROUPS = 4, 2
ONE_RANK = "import runpy; runpy.run_path({file!r})['run_rank']({folder!r})"
SHAPES = {
    "embedding.weight": (6, 4),
    **{f"blocks.{block}.{kind}": shape for block in range(5) for kind, shape in (("up", (4, 6)), ("norm", (4,)))},
    "head.weight": (4, 6),
}


def weights(mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """Alike everywhere; with a mesh, matrices are split along its axis ``shard``."""
    draws = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    if mesh is not None:
        made = {n: distribute_tensor(w, mesh["shard"], [Shard(0)]) if w.ndim > 1 else w for n, w in made.items()}
    return made


def gradient(step: int, group: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(100 * step + group)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def descend(parameters: dict[str, Tensor], gradients: dict[str, Tensor], rate: float = 0.1) -> None:
    """A step of plain gradient descent; of a split tensor each rank takes its part."""
    for name, parameter in parameters.items():
        slope = gradients[name]
        if parameter is not local(parameter):
            slope = local(distribute_tensor(slope, parameter.device_mesh, parameter.placements))
        local(parameter).sub_(slope, alpha=rate)


def train(
    outer: OuterOptimizer, parameters: dict[str, Tensor], steps: range, group: int = 0, finish: bool = False
) -> None:
    for step in steps:
        descend(parameters, gradient(step, group))
        outer.after_step(step + 1)
    if finish:
        outer.finish(steps.stop)


def alone(**options: object) -> tuple[OuterOptimizer, dict[str, Tensor]]:
    parameters = weights()
    return OuterOptimizer(parameters, LowCommunication(groups=1, **options), None), parameters


def close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(whole(found[name]).float(), tensor.float(), atol=limit, rtol=limit)


# One process


def test_every_parameter_is_in_one_fragment_of_whole_layers_and_neighbours_are_apart() -> None:
    fragments = fragments_of(list(SHAPES), 3)
    assert sorted(name for fragment in fragments for name in fragment) == sorted(SHAPES)
    assert fragments[0] == ["embedding.weight", "blocks.2.up", "blocks.2.norm", "head.weight"]
    assert fragments[1] == ["blocks.0.up", "blocks.0.norm", "blocks.3.up", "blocks.3.norm"]
    assert len(fragments_of(list(SHAPES), 100)) == 7


@pytest.mark.parametrize(("fragments", "every"), [(1, 6), (3, 6), (3, 7), (4, 4)])
def test_every_parameter_is_exchanged_once_in_each_period_the_last_at_its_end(fragments: int, every: int) -> None:
    outer, parameters = alone(every=every, fragments=fragments)
    moved: dict[str, list[int]] = {name: [] for name in parameters}
    for step in range(3 * every):
        before = {name: shared.clone() for name, shared in outer.shared.items()}
        train(outer, parameters, range(step, step + 1))
        for name, shared in outer.shared.items():
            if not torch.equal(shared, before[name]):
                moved[name].append(step + 1)
    assert len({tuple(steps) for steps in moved.values()}) == fragments
    assert max(steps[0] for steps in moved.values()) == every
    for first, *later in moved.values():
        assert later == [first + every, first + 2 * every]


def test_shared_weights_take_the_nesterov_steps_of_torch() -> None:
    outer, parameters = alone(every=3, outer_learning_rate=0.7, outer_momentum=0.9)
    reference = {name: torch.nn.Parameter(weight) for name, weight in weights().items()}
    optimizer = torch.optim.SGD(reference.values(), lr=0.7, momentum=0.9, nesterov=True)
    for step in range(0, 12, 3):
        train(outer, parameters, range(step, step + 3))
        for name, weight in reference.items():
            weight.grad = sum(gradient(each, 0)[name] for each in range(step, step + 3)) * 0.1
        optimizer.step()
        close(outer.shared, {name: weight.detach() for name, weight in reference.items()}, 1e-5)
        assert all(torch.equal(parameters[name], shared) for name, shared in outer.shared.items())


def test_a_late_exchange_brings_what_was_sent_and_keeps_half_of_what_came_since() -> None:
    """The closed form of one exchange that is sent after four steps and comes after six."""
    outer, parameters = alone(every=4, overlap=2, mixing=0.5, outer_learning_rate=1.0, outer_momentum=0.0)
    train(outer, parameters, range(5))
    close(outer.shared, weights())
    train(outer, parameters, range(5, 6))
    sent, now = weights(), weights()
    for step in range(6):
        descend(now, gradient(step, 0))
        if step < 4:
            descend(sent, gradient(step, 0))
    close(outer.shared, sent, 1e-5)
    close(parameters, {name: (sent[name] + now[name]) / 2 for name in sent}, 1e-5)


def test_the_shared_weights_are_shown_and_the_own_ones_come_back_to_the_bit() -> None:
    outer, parameters = alone(every=4)
    train(outer, parameters, range(6))
    own = {name: parameter.clone() for name, parameter in parameters.items()}
    with outer.shared_weights():
        assert all(torch.equal(parameters[name], shared) for name, shared in outer.shared.items())
    assert all(torch.equal(parameters[name], weight) for name, weight in own.items())
    assert any(not torch.equal(outer.shared[name], weight) for name, weight in own.items())


@pytest.mark.parametrize("options", [{}, {"fragments": 3}, {"fragments": 2, "overlap": 2}])
@pytest.mark.parametrize("stop", range(4, 12))
def test_a_run_that_stopped_anywhere_goes_on_to_the_bit(options: dict[str, int], stop: int) -> None:
    straight, there = alone(every=4, **options)
    train(straight, there, range(16), finish=True)
    first, here = alone(every=4, **options)
    train(first, here, range(stop))
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    own = {name: parameter.clone() for name, parameter in here.items()}
    resumed, again = alone(every=4, **options)
    for name, parameter in again.items():
        parameter.copy_(own[name])
    resumed.load(saved, stop)
    for outer, parameters in ((resumed, again), (first, here)):  # saving leaves no trace either
        train(outer, parameters, range(stop, 16), finish=True)
        assert all(torch.equal(parameters[name], weight) for name, weight in there.items())
        assert all(torch.equal(tensor, straight.tensors()[name]) for name, tensor in outer.tensors().items())


def test_at_the_end_nothing_that_was_trained_is_lost() -> None:
    """With a rate of 1 and no momentum, what is shared in the end is what was trained."""
    for options in ({}, {"fragments": 3}):
        outer, parameters = alone(every=5, outer_learning_rate=1.0, outer_momentum=0.0, **options)
        train(outer, parameters, range(13), finish=True)
        expected = weights()
        for step in range(13):
            descend(expected, gradient(step, 0))
        close(outer.shared, expected, 1e-5)
        close(parameters, expected, 1e-5)


def test_an_exchange_at_the_end_is_not_made_twice() -> None:
    outer, parameters = alone(every=5)
    train(outer, parameters, range(10))
    before = {name: shared.clone() for name, shared in outer.shared.items()}
    outer.finish(10)
    assert all(torch.equal(outer.shared[name], shared) for name, shared in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 5, "overlap": 5}, r"overlap \(5\) must be less than every \(5\)"),
        ({"every": 2, "fragments": 3}, r"fragments \(3\) must be at most every \(2\)"),
        ({"bits": 5}, "bits"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LowCommunication(**options)


# Two groups of two ranks; the ranks of a group share each matrix


def made(mesh: DeviceMesh, sharded: bool = True, **options: object) -> tuple[OuterOptimizer, dict[str, Tensor], int]:
    parameters = weights(mesh if sharded else None)
    outer = OuterOptimizer(parameters, LowCommunication(groups=GROUPS, **options), mesh["group"].get_group())
    return outer, parameters, mesh["group"].get_local_rank()


def every_step_a_mean_is_data_parallel(mesh: DeviceMesh) -> None:
    for sharded in (False, True):
        outer, parameters, group = made(mesh, sharded, every=1, outer_learning_rate=1.0, outer_momentum=0.0)
        expected = weights()
        for step in range(5):
            train(outer, parameters, range(step, step + 1), group)
            mean = {name: sum(gradient(step, each)[name] for each in range(GROUPS)) / GROUPS for name in SHAPES}
            descend(expected, mean)
            close(parameters, expected, 1e-5)


def groups_are_apart_in_between_and_alike_after(mesh: DeviceMesh) -> None:
    outer, parameters, group = made(mesh, every=4, outer_learning_rate=0.7, outer_momentum=0.9)
    progress = [sum(gradient(step, each)["head.weight"] for step in range(4)) * 0.1 for each in range(GROUPS)]
    train(outer, parameters, range(3), group)
    everyone: list[Tensor] = [torch.empty(0)] * RANKS
    distributed.all_gather_object(everyone, whole(parameters["head.weight"]))
    assert torch.equal(everyone[0], everyone[1])
    assert not torch.allclose(everyone[0], everyone[2], atol=1e-3)
    train(outer, parameters, range(3, 4), group)
    distributed.all_gather_object(everyone, whole(parameters["head.weight"]))
    expected = weights()["head.weight"] - 0.7 * 1.9 * sum(progress) / GROUPS
    for found in everyone:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def rounded_exchanges_are_near_and_alike(mesh: DeviceMesh) -> None:
    numbers = sum(local(weight).numel() for weight in weights(mesh).values())
    blocks = len(SHAPES)  # small as they are, one for each
    exact, *_ = first = made(mesh, every=3)
    train(*first[:2], range(3), first[2])
    sizes = {32: 4 * numbers, 16: 2 * numbers, 8: blocks * 260, 4: blocks * 132}
    assert exact.bytes_sent == sizes[32]
    for bits, levels in ((16, 256), (8, 254), (4, 14)):
        outer, parameters, group = made(mesh, every=3, bits=bits)
        train(outer, parameters, range(3), group)
        assert outer.bytes_sent == sizes[bits]
        for name, shared in outer.shared.items():
            everyone: list[Tensor] = [torch.empty(0)] * RANKS
            distributed.all_gather_object(everyone, whole(shared))
            assert all(torch.equal(everyone[0], other) for other in everyone)
            largest = 1.33 * max(  # 0.7 * 1.9, of the largest outer gradient that may be in a block
                (sum(gradient(step, each)[other] for step in range(3)) * 0.1).abs().max()
                for each in range(GROUPS)
                for other in SHAPES
            )
            error = (whole(shared) - whole(exact.shared[name])).abs().max()
            assert 0 < error <= largest / levels


def fragments_and_late_exchanges_end_alike(mesh: DeviceMesh) -> None:
    outer, parameters, group = made(mesh, every=6, fragments=3, overlap=2, bits=8)
    train(outer, parameters, range(20), group, finish=True)
    for name, parameter in parameters.items():
        everyone: list[Tensor] = [torch.empty(0)] * RANKS
        distributed.all_gather_object(everyone, whole(parameter))
        assert all(torch.equal(everyone[0], other) for other in everyone)
        assert torch.equal(local(parameter), local(outer.shared[name]))


def a_checkpoint_anywhere_holds_every_group(mesh: DeviceMesh, folder: Path) -> None:
    """Stop amid a late exchange, with every group's own weights; into new ones, to the bit."""
    options = {"every": 4, "fragments": 2, "overlap": 3, "bits": 8}
    straight, there, group = made(mesh, **options)
    train(straight, there, range(15), group, finish=True)
    first, here, group = made(mesh, **options)
    train(first, here, range(9), group)

    def tensors(outer: OuterOptimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return outer.tensors() | {f"groups.{n}": t for n, t in by_group(parameters, mesh, "group").items()}

    CheckpointStore(folder).save(9, tensors(first, here), {}, wait=True)
    resumed, again, group = made(mesh, **options)
    for parameter in again.values():
        local(parameter).zero_()
    checkpoint = CheckpointStore(folder).load(into=tensors(resumed, again))
    resumed.load(checkpoint.tensors, 9)
    for name, parameter in again.items():
        assert torch.equal(local(parameter), local(here[name]))
    train(resumed, again, range(9, 15), group, finish=True)
    for name, parameter in there.items():
        assert torch.equal(local(again[name]), local(parameter))
    # As whole tensors, with the groups in front.
    read = CheckpointStore(folder).load().tensors
    assert read["groups.head.weight"].shape == (GROUPS, *SHAPES["head.weight"])
    everyone: list[Tensor] = [torch.empty(0)] * RANKS
    distributed.all_gather_object(everyone, whole(here["head.weight"]))
    for rank, own in enumerate(everyone):
        assert torch.equal(read["groups.head.weight"][rank // 2], own)


CASES: list[Callable[..., None]] = [
    every_step_a_mean_is_data_parallel,
    groups_are_apart_in_between_and_alike_after,
    rounded_exchanges_are_near_and_alike,
    fragments_and_late_exchanges_end_alike,
    a_checkpoint_anywhere_holds_every_group,
]


def run_rank(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (GROUPS, RANKS // GROUPS), mesh_dim_names=("group", "shard"))
    failed = {}
    for case in CASES:
        try:
            case(mesh, Path(folder) / "checkpoints") if "checkpoint" in case.__name__ else case(mesh)
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
def test_on_two_groups_of_two_ranks(failed: list[dict[str, str]], case: str) -> None:
    for found in failed:
        assert case not in found, found[case]

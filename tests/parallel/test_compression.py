"""Real processes on gloo: compressed sums are as near to the plain ones as they promise, and lose nothing for good."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks, codes
from torch import Tensor, distributed

from genscale.parallel.compression import HalfSum, PowerSGD, packed, unpacked
from genscale.parallel.traffic import measured_traffic

RANKS = 3
SHAPES = [torch.Size(shape) for shape in ((7,), (32, 24), (), (16, 4, 9), (2, 3), (5,))]
"""A matrix and a kernel that are compressed among what is not."""
SIZES = [shape.numel() for shape in SHAPES]
ONE_RANK = "import runpy; runpy.run_path({file!r})['run_rank']({folder!r})"


def gradient(rank: int, step: int = 0) -> Tensor:
    """All of a bucket, flat."""
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(100 * step + rank))


def total(step: int = 0) -> Tensor:
    return torch.stack([gradient(rank, step).double() for rank in range(RANKS)]).sum(0)


def parts(flat: Tensor) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split(SIZES), SHAPES, strict=True)]


def summed(compressor: HalfSum | PowerSGD, flat: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """By the compressor, in place; alike on all ranks."""
    group = group or distributed.group.WORLD
    compressor.start(0, flat, SHAPES, group)()
    everyone = [torch.empty_like(flat) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, flat, group=group)
    assert all(torch.equal(flat, other) for other in everyone)
    return flat


def a_sum_in_bfloat16_is_rounded_twice(rank: int) -> None:
    sizes = torch.stack([gradient(each).abs() for each in range(RANKS)]).sum(0) + total().abs()
    error = (summed(HalfSum(), gradient(rank)) - total()).abs()
    assert (error <= 2**-8 * sizes * 1.01).all()
    assert error.max() > 1e-4


def half_the_bytes_in_bfloat16(rank: int) -> None:
    flat = torch.zeros(3000)
    with measured_traffic({}) as traffic:
        HalfSum().start(0, flat, [flat.shape], distributed.group.WORLD)()
    assert traffic.bytes == 2 * 3000 * 2 * (RANKS - 1) / RANKS


def matrices_of_a_low_rank_are_exact(rank: int) -> None:
    draws = torch.Generator().manual_seed(rank)
    flat = torch.cat(
        [
            (torch.randn(32, 1, generator=draws) @ torch.randn(1, 24, generator=draws)).flatten() if size == 768 else x
            for size, x in zip(SIZES, gradient(rank).split(SIZES), strict=True)
        ]
    )
    expected = flat.clone()
    distributed.all_reduce(expected)
    found = summed(PowerSGD(rank=RANKS), flat)
    torch.testing.assert_close(parts(found)[1], parts(expected)[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(parts(found)[3], parts(expected)[3], atol=1e-2)


def one_step_is_a_projection_onto_the_image_of_the_first_factor(rank: int) -> None:
    compressor = PowerSGD(rank=2)
    found = parts(summed(compressor, gradient(rank)).double())
    for place, (part, exact) in enumerate(zip(found, parts(total()), strict=True)):
        if place in (1, 3):
            matrix = exact.flatten(1)
            start = torch.randn(matrix.shape[1], 2, generator=torch.Generator().manual_seed(0)).double()
            basis = torch.linalg.qr(matrix @ start).Q
            exact = (basis @ basis.mT @ matrix).view_as(exact)
        torch.testing.assert_close(part, exact, atol=1e-5, rtol=1e-5)


def what_was_applied_and_what_is_left_is_all_there_was(rank: int) -> None:
    compressor, steps = PowerSGD(rank=2), 12
    applied = torch.stack([summed(compressor, gradient(rank, step)).double() for step in range(steps)]).sum(0)
    wanted = torch.stack([total(step) for step in range(steps)]).sum(0)
    state = compressor.state()
    left = {1: state["error.0.1.32x24"], 3: state["error.0.3.16x36"]}
    for place, (given, all_of_it) in enumerate(zip(parts(applied), parts(wanted), strict=True)):
        rest = left[place].view_as(given).double() if place in left else torch.zeros_like(given)
        torch.testing.assert_close(given + rest, all_of_it, atol=1e-4, rtol=1e-5)
        assert (rest.norm() > 1) == (place in left)


def a_gradient_that_stays_is_learned(rank: int) -> None:
    """With the factor kept from step to step, the mean of what is applied comes to the truth."""
    compressor, steps = PowerSGD(rank=2), 200
    applied = sum(parts(summed(compressor, gradient(rank)))[1] for _ in range(steps)) / steps
    wanted = parts(total().float())[1]
    assert (applied - wanted).norm() < 0.1 * wanted.norm()


def the_first_steps_are_plain(rank: int) -> None:
    compressor = PowerSGD(rank=2, start_after_steps=2)
    differ = [(summed(compressor, gradient(rank)).double() - total()).abs().max() > 1e-5 for _ in range(4)]
    assert differ == [False, False, True, True]


def one_goes_on_from_a_checkpoint_on_any_number_of_ranks(rank: int) -> None:
    group = distributed.new_group([0, 1])
    straight = PowerSGD(rank=2, start_after_steps=1)
    for step in range(4):
        summed(straight, gradient(rank, step))
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed = PowerSGD(rank=2, start_after_steps=1)
    resumed.load(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in resumed.state().items() if name[0] in "ef")
    expected = summed(straight, gradient(rank, 4))
    torch.testing.assert_close(summed(resumed, gradient(rank, 4)), expected, atol=1e-4, rtol=1e-4)
    if rank < 2:  # the third one's gradient is now the second's
        fewer = PowerSGD(rank=2, start_after_steps=1)
        fewer.load(state)
        flat = gradient(rank, 4) + (gradient(2, 4) if rank else 0)
        torch.testing.assert_close(summed(fewer, flat, group), expected, atol=1e-4, rtol=1e-4)


def an_overflow_is_not_carried_on(rank: int) -> None:
    compressor = PowerSGD(rank=2)
    summed(compressor, gradient(rank))
    bad = gradient(rank)
    bad[7 if rank == 1 else 0] = torch.inf
    compressor.start(0, bad, SHAPES, distributed.group.WORLD)()
    assert not bad.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in compressor.state().values())
    assert summed(compressor, gradient(rank)).isfinite().all()


def only_the_factors_are_sent(rank: int) -> None:
    flat = torch.zeros(100 * 80 + 5)
    with measured_traffic({}) as traffic:
        PowerSGD(rank=4).start(0, flat, [torch.Size((100, 80)), torch.Size((5,))], distributed.group.WORLD)()
    [row] = traffic.table()
    assert (row.collective, row.calls) == ("all_reduce", 2)
    assert row.bytes == pytest.approx(4 * (4 * 180 + 5) * 2 * (RANKS - 1) / RANKS, abs=1)


CASES: list[Callable[[int], None]] = [
    a_sum_in_bfloat16_is_rounded_twice,
    half_the_bytes_in_bfloat16,
    matrices_of_a_low_rank_are_exact,
    one_step_is_a_projection_onto_the_image_of_the_first_factor,
    what_was_applied_and_what_is_left_is_all_there_was,
    a_gradient_that_stays_is_learned,
    the_first_steps_are_plain,
    one_goes_on_from_a_checkpoint_on_any_number_of_ranks,
    an_overflow_is_not_carried_on,
    only_the_factors_are_sent,
]


def run_rank(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    failed = {}
    for case in CASES:
        try:
            case(rank)
        except Exception:
            failed[case.__name__] = traceback.format_exc()
    torch.save(failed, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong on each rank, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = Ranks(ONE_RANK.format(file=__file__, folder=str(folder)), RANKS).end(60)
    assert codes(ended) == [0] * RANKS, ended
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_three_ranks(failed: list[dict[str, str]], case: str) -> None:
    for found in failed:
        assert case not in found, found[case]


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5001])
@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_integers_are_off_by_half_a_level_of_their_block_at_most(count: int, bits: int, levels: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, count)
    piece = packed(x, bits)
    blocks = -(-count // 256)
    assert piece.dtype == torch.uint8
    assert len(piece) == blocks * (4 + 32 * bits)
    back = unpacked(piece, bits, count)
    for start in range(0, count, 256):
        block = x[start : start + 256]
        assert (block - back[start : start + 256]).abs().max() <= block.abs().max() / (2 * levels) * 1.001


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_whole_levels_and_zeros_come_back_to_the_bit(bits: int, levels: int) -> None:
    x = torch.cat([torch.arange(-levels, levels + 1.0), torch.zeros(600)])
    assert torch.equal(unpacked(packed(x, bits), bits, len(x)), x)


def test_sixteen_bits_are_bfloat16() -> None:
    x = torch.randn(1001)
    piece = packed(x, 16)
    assert piece.nbytes == 2002
    assert torch.equal(unpacked(piece, 16, 1001), x.bfloat16().float())

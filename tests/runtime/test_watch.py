"""No rank hangs, dies or fails without all ending with one line that says which, and where it stood."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import Ranks, codes, lines

from genscale.runtime.failure import exit_code, is_collective_failure, is_timeout
from genscale.runtime.stragglers import StragglerWatch
from genscale.runtime.watch import Report, Watch, _Beats, behind, watching
from genscale.runtime.world import World

HOST = socket.gethostname()

BEGIN = """
import os, signal, time
from pathlib import Path
import torch
from genscale.runtime.errors import UserError
from genscale.runtime.watch import watching
from genscale.runtime.world import from_rank_0, join_world
world = join_world(torch.device("cpu"))
x = torch.ones(3)
together = torch.distributed.all_reduce
"""


def run(body: str, environment: dict[str, str] | None = None, arguments: str = "", seconds: float = 30) -> Ranks:
    """Four ranks whose steps are ``body``; returned before they have ended."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return Ranks(f"{BEGIN}with watching({arguments}) as watch:\n    together(x)\n{indented}", 4, environment)


STEP = """
watch.at(13, "backward")
{fault}
watch.at(13, "gradients", together=True)
together(x)
"""


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        ("raise UserError('the recipe is wrong')", 2, ["error: the recipe is wrong"]),
        ("1 / 0", 1, ["ZeroDivisionError: division by zero"]),
        ("raise KeyboardInterrupt", 130, []),
    ],
    ids=["mistake", "fault", "interrupted"],
)
def test_only_the_rank_that_failed_tells_and_all_end_with_its_code(
    fault: str, code: int, expected: list[str], failing: int
) -> None:
    begun = time.monotonic()
    ended = run(STEP.format(fault=f"if rank == {failing}: {fault}")).end()
    assert time.monotonic() - begun < 10
    assert codes(ended) == [code] * 4
    assert [line for line in lines(ended) if "rror: " in line] == expected
    assert [rank for rank in ended if lines({rank: ended[rank]})] == ([failing] if expected else [])


def test_what_all_ranks_find_at_once_is_told_once() -> None:
    ended = run("raise UserError('the loss is not finite')").end()
    assert (codes(ended), lines(ended)) == ([2] * 4, ["error: the loss is not finite"])
    ended = run("from_rank_0(lambda: (_ for _ in ()).throw(UserError('no store')))").end()
    assert (codes(ended), lines(ended)) == ([2] * 4, ["error: no store"])


def test_ranks_that_wait_for_rank_0_learn_of_its_fault() -> None:
    ended = run("from_rank_0(lambda: 1 / 0)").end()
    assert codes(ended) == [1] * 4
    assert lines({rank: each for rank, each in ended.items() if rank}) == []


def test_a_rank_that_computes_on_its_own_is_ended_when_another_one_fails() -> None:
    """Its main thread neither waits in a collective nor looks at anything."""
    begun = time.monotonic()
    ended = run("if rank == 1: raise UserError('a mistake')\nif rank == 3: time.sleep(60)\ntogether(x)").end()
    assert (codes(ended), lines(ended)) == ([2] * 4, ["error: a mistake"])
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_is_killed_is_named(killed: int) -> None:
    begun = time.monotonic()
    fault = f"if rank == {killed}: time.sleep(1.2); os.kill(os.getpid(), signal.SIGKILL)"
    ranks = run(STEP.format(fault=fault))
    ended = ranks.end()
    assert time.monotonic() - begun < 15
    assert codes(ended) == [-signal.SIGKILL if rank == killed else 1 for rank in range(4)]
    [line] = lines(ended)
    assert line.startswith(
        f"error: rank {killed} (pid {ranks.pid(killed)} on {HOST}) is gone: it was last seen in step 14, backward; "
    )


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_flight_records_of_all_are_kept(tmp_path: Path) -> None:
    begun = time.monotonic()
    folder = tmp_path / "flight"
    ranks = run(
        STEP.format(fault="if rank == 2: time.sleep(60)"),
        {"GENSCALE_COLLECTIVE_SECONDS": "3"},
        f"Path({str(folder)!r})",
    )
    ended = ranks.end()
    assert time.monotonic() - begun < 20
    assert codes(ended) == [1] * 4
    [line] = lines(ended)
    assert line.startswith(f"error: rank 2 (pid {ranks.pid(2)} on {HOST}) has not moved for ")
    assert "s: it stands in step 14, backward; the others wait in step 14, gradients; torchfrtrace reads " in line
    assert sorted(file.name for file in folder.iterdir()) == [f"rank-{rank}" for rank in range(4)]
    analyser = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder)]
    analysed = subprocess.run(analyser, capture_output=True, text=True, timeout=60)
    assert "missing ranks: {2}" in analysed.stdout + analysed.stderr


@pytest.mark.slow
def test_a_rank_that_is_stopped_gives_no_sign_of_life() -> None:
    fault = "if rank == 2: time.sleep(1.2); os.kill(os.getpid(), signal.SIGSTOP)"
    ranks = run(STEP.format(fault=fault), arguments="silence_seconds=4")
    ended = ranks.end(seconds=20, but=2)
    assert codes(ended) == [1, 1, None, 1]
    [line] = lines(ended)
    assert line.startswith(f"error: rank 2 (pid {ranks.pid(2)} on {HOST}) has given no sign of life for 4 s, last in ")


def test_ranks_that_end_well_at_different_times_say_nothing() -> None:
    ended = run("assert from_rank_0(lambda: 5) == 5\ntime.sleep(0.4 * rank)").end()
    assert (codes(ended), lines(ended)) == ([0] * 4, [])


def report(rank: int, step: int, phase: str, together: bool = True, still: float = 75, collectives: int = 9) -> Report:
    return Report(rank, 100 + rank, "n1", 1, step, phase, together, still, collectives)


def test_the_rank_that_keeps_the_others_waiting_is_found() -> None:
    waiting = [report(rank, 13, "gradients") for rank in (0, 1, 3)]
    assert behind([*waiting, report(2, 13, "backward", together=False)]) == (
        "rank 2 (pid 102 on n1) has not moved for 75 s: it stands in step 14, backward; "
        "the others wait in step 14, gradients"
    )
    assert behind([*waiting, report(2, 12, "gradients")]).startswith("rank 2 (pid 102 on n1) has not moved for 75 s")
    assert behind([*waiting, report(2, 13, "gradients", collectives=7)]) == (
        "rank 2 (pid 102 on n1) has not moved for 75 s: it stands in step 14, gradients; "
        "the others wait in step 14, gradients, 2 collectives further"
    )
    assert behind(waiting) == (
        "no rank has moved for 75 s: all 3 wait in step 14, gradients; see the network between their hosts"
    )


def test_silence_is_counted_in_looks_not_by_the_clock() -> None:
    beats = _Beats(2, silence_seconds=6)  # three looks, one in two seconds
    for beat in range(1, 6):
        silent = beats.silent([Report(0, 1, "n1", beat=beat), Report(1, 2, "n1", beat=1)])
    assert [each.rank for each in silent] == [1]
    assert beats.silent([Report(0, 1, "n1", beat=9), Report(1, 2, "n1", beat=1, left=True)]) == []


def test_a_lone_process_knows_its_place() -> None:
    with watching() as watch:
        assert type(watch) is Watch
        assert watch.place == "start"
        watch.at(13, "backward")
        assert watch.place == "step 14, backward"
        begun = time.perf_counter()
        for step in range(10_000):
            watch.at(step, "forward")
        assert (time.perf_counter() - begun) / 10_000 < 5e-6


def test_consequences_are_told_from_causes() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation")
    assert is_collective_failure(closed)
    assert is_collective_failure(late)
    assert not is_timeout(closed)
    assert is_timeout(late)
    assert not is_collective_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_collective_failure(OSError("Connection reset by peer"))
    assert [exit_code(error) for error in (KeyboardInterrupt(), SystemExit(3), ValueError())] == [130, 3, 1]


SLOW = f"""
{BEGIN}
from genscale.runtime.stragglers import StragglerWatch
watch = StragglerWatch(world, window=5)
said = []
for step in range(40):
    slow = rank == 2 and 10 <= step < 20 or rank == 1 and step == 7 or rank == 3 and step >= 30
    watch.observe(0.1 * (1.8 if slow else 1.0) + 0.001 * rank)
    if step % 5 == 4:
        said += [(step, line) for line in watch.slow_ranks()]
print("> " + repr(said))
"""


def test_a_rank_that_is_slow_for_many_steps_is_named_once() -> None:
    ended = Ranks(SLOW, 4).end()
    assert codes(ended) == [0] * 4
    said = {each.printed for each in ended.values()}
    assert len(said) == 1  # all ranks know it
    assert eval(said.pop()[2:]) == [
        (14, f"rank 2 on host {HOST} is slow: 1.8 times the median of the ranks over the last 5 steps"),
        (34, f"rank 3 on host {HOST} is slow: 1.8 times the median of the ranks over the last 5 steps"),
    ]


def test_a_lone_rank_is_never_slow() -> None:
    watch = StragglerWatch(World())
    watch.observe(1.0)
    assert watch.slow_ranks() == []

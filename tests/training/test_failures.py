"""The real command on four ranks when some of them do not behave, seen from outside: what is printed, how all end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ended, Ranks, codes, lines

from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.training.checkpoint import CheckpointStore

MakeRecipe = Callable[..., Recipe]
HOST = socket.gethostname()

COMMAND = """
import os, signal, sys, time
import torch
from genscale.cli.main import main
from genscale.runtime import peak

peak._MEASURING_SECONDS = 0.05
backward, calls = torch.Tensor.backward, 0

def faulty(*arguments, **options):
    global calls
    calls += 1
    if rank == {rank} and calls == {step}:
        {fault}
    return backward(*arguments, **options)

torch.Tensor.backward = faulty
main(["train", {file!r}, "--json"] + {overrides})
"""
"""``genscale train``, with a fault of one rank in the backward pass of one step, counted from 1."""


@pytest.fixture
def file(recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A recipe of 40 steps, each of one micro-batch on each of four ranks, with a checkpoint every five."""
    made = recipe(run=str(tmp_path / "run"), **{"training.budget": "40 steps", "layout.micro_batch": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(made))
    return path


def train(
    file: Path,
    fault: str = "pass",
    rank: int = 2,
    step: int = 14,
    environment: dict[str, str] | None = None,
    overrides: str = "[]",
) -> Ranks:
    program = COMMAND.format(file=str(file), fault=fault, rank=rank, step=step, overrides=overrides)
    return Ranks(program, 4, environment)


def complaints(ended: dict[int, Ended]) -> list[str]:
    """What is printed but rank 0's result."""
    return [line for line in lines(ended) if line and not line.startswith("{")]


def test_ranks_with_different_recipes_end_before_they_begin(file: Path, tmp_path: Path) -> None:
    ended = train(file, overrides="(['training.batch=4 samples', 'seed=7'] if rank == 3 else [])").end()
    assert codes(ended) == [2] * 4
    assert complaints(ended) == [
        f"error: rank 3 on host {HOST} has another recipe: seed: 3 -> 7, training.batch: 8 samples -> 4 samples; "
        "all ranks need the same"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_same_command_goes_on(file: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    ranks = train(file, "os.kill(os.getpid(), signal.SIGKILL)")
    ended = ranks.end()
    assert time.monotonic() - begun < 20
    assert codes(ended) == [1, 1, -signal.SIGKILL, 1]
    [line] = complaints(ended)
    assert line.startswith(f"error: rank 2 (pid {ranks.pid(2)} on {HOST}) is gone: it was last seen in ")
    assert codes(train(file).end()) == [0] * 4
    run = Run.open(tmp_path / "run")
    assert run.facts["status"] == "finished"
    assert "resume" in [event["kind"] for event in run.events()]


def test_one_rank_without_memory_ends_all_with_advice(file: Path) -> None:
    begun = time.monotonic()
    ended = train(file, "torch.empty(1 << 50, dtype=torch.uint8)").end()
    assert time.monotonic() - begun < 15
    assert codes(ended) == [2] * 4
    [line] = complaints(ended)
    assert line.startswith("error: rank 2 ran out of memory on cpu in step 14, train, micro-batch 1: ")
    assert line.endswith("to make it fit: layout.micro_batch: 2 -> 1, or layout.recompute: full, or more layout.shard")


def test_a_fault_of_one_rank_is_one_traceback(file: Path) -> None:
    ended = train(file, "raise ValueError('a fault')", rank=0).end()
    assert codes(ended) == [1] * 4
    assert [line for line in complaints(ended) if "Error" in line] == ["ValueError: a fault"]
    assert all(not complaints({rank: ended[rank]}) for rank in (1, 2, 3))


@pytest.mark.slow
def test_a_hanging_rank_is_named_with_its_step(file: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    ranks = train(file, "time.sleep(100)", environment={"GENSCALE_COLLECTIVE_SECONDS": "4"})
    ended = ranks.end()
    assert time.monotonic() - begun < 25
    assert codes(ended) == [1] * 4
    [line] = complaints(ended)
    assert line.startswith(f"error: rank 2 (pid {ranks.pid(2)} on {HOST}) has not moved for ")
    assert "it stands in step 14, train, micro-batch 1; the others wait in step 14, train, gradients" in line
    assert len(list((tmp_path / "run/flight").iterdir())) == 4


@pytest.mark.slow
def test_sigterm_on_all_ranks_saves_though_one_of_them_is_late(file: Path, tmp_path: Path) -> None:
    """Three wait in a collective for the fourth when the signal comes, to each at another moment."""
    ranks = train(file, "print('> slow', flush=True); time.sleep(2)", rank=3)
    ranks.wait_until_printed("> slow", 3)
    time.sleep(0.5)
    begun = time.monotonic()
    for rank in (2, 0, 3, 1):
        ranks.signal(rank, signal.SIGTERM)
        time.sleep(0.2)
    ended = ranks.end(20)
    assert time.monotonic() - begun < 15
    assert codes(ended) == [130] * 4
    assert set(complaints(ended)) == {"interrupted; the same command goes on from here"}
    assert Run.open(tmp_path / "run").facts["status"] == "interrupted"
    assert CheckpointStore(tmp_path / "run/checkpoints").steps()[-1] == 14


@pytest.mark.slow
def test_a_slow_rank_is_named_once(file: Path, tmp_path: Path) -> None:
    always = train(file, "calls = 0; time.sleep(0.1)", rank=1, step=1)  # counts from 1 again: slow in every step
    assert codes(always.end()) == [0] * 4
    slow = [event for event in Run.open(tmp_path / "run").events() if event["kind"] == "slow_rank"]
    [event] = slow
    assert event["message"].startswith(f"rank 1 on host {HOST} is slow: ")
    assert event["message"].endswith(" times the median of the ranks over the last 20 steps")


ONCE = """
import os, signal, sys
import torch
backward, calls = torch.Tensor.backward, 0
def killed_once(*arguments, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and calls == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*arguments, **options)
torch.Tensor.backward = killed_once
from genscale.cli.main import main
main(["train", sys.argv[1], "--json"])
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_after_one_was_killed(file: Path, tmp_path: Path) -> None:
    """Torchrun keeps the store of the first life, with all that stands in it, for the second."""
    program = tmp_path / "once.py"
    program.write_text(ONCE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*launcher, str(program), str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: rank 1 (pid ") == 1
    run = Run.open(tmp_path / "run")
    assert (run.facts["status"], run.facts["ranks"]) == ("finished", 2)
    assert "resume" in [event["kind"] for event in run.events()]

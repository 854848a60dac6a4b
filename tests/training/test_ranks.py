"""Real processes on gloo: any number of ranks trains the same model, and all of them end together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run

MakeRecipe = Callable[..., Recipe]

GENTLE = {"kind": "muon", "learning_rate": 1e-3, "rest": {"learning_rate": 3e-4}}
"""At higher rates differences in rounding, which ranks cannot avoid, grow from step to step."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


ONE_RANK = """
import os, sys
from genscale.cli.main import main

os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT="{port}")
os.environ |= dict(WORLD_SIZE="{size}", RANK="{rank}", LOCAL_RANK="{rank}")
printed = os.open("{file}.rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for descriptor in (1, 2):
    os.dup2(printed, descriptor)
main(["train", "{file}", "--json"])
"""
"""The command as torchrun starts it, with what it prints in a file."""


def start(file: Path, size: int) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")  # torch is imported once, in the server
    context.set_forkserver_preload(["genscale.training.run", "genscale.cli.train"])
    port = free_port()
    programs = [ONE_RANK.format(file=file, rank=rank, size=size, port=port) for rank in range(size)]
    ranks = [context.Process(target=exec, args=(program,)) for program in programs]
    for rank in ranks:
        rank.start()
    return ranks


def end(ranks: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Exit codes; None for a rank that had not ended in time."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def train_on(recipe_of: MakeRecipe, tmp_path: Path) -> Callable[..., Run]:
    """``train_on(2, **overrides)``: train on that many ranks, to the end; ``name`` is the run's."""

    def train_on(size: int, name: str, kind: str = "causal", **overrides: object) -> Run:
        file = write(partial(recipe_of, kind), tmp_path, name, **overrides)
        assert end(start(file, size)) == [0] * size, printed(file)
        return Run.open(tmp_path / name)

    return train_on


def write(make: MakeRecipe, folder: Path, name: str, **overrides: object) -> Path:
    settings = {"training.budget": "12 steps", "training.validation.every": "4 steps", **overrides}
    file = folder / f"{name}.yaml"
    file.write_text(recipe_to_yaml(make(run=str(folder / name), **settings)))
    return file


def printed(file: Path) -> str:
    return "".join(path.read_text() for path in sorted(file.parent.glob(f"{file.name}.rank-*")))


def curve(run: Run) -> list[float]:
    """Losses of all steps, then of all validations."""
    records = run.metrics()
    assert [record["step"] for record in records if "learning_rate" in record] == list(range(1, run.facts["steps"] + 1))
    names = ("loss", "discriminator_loss", "generator_loss", "validation_loss")
    return [record[name] for name in names for record in records if name in record]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("causal", {"model.dropout": 0.1, "training.optimizer": GENTLE}),
        ("flow", {"model.dropout": 0.1}),
        ("adversarial", {"objective.augmentation": {"flip": True, "translate": 0.2}}),
    ],
)
def test_any_number_of_ranks_gives_the_curve_of_one_process(
    train_on: Callable[..., Run], kind: str, settings: dict
) -> None:
    """On three ranks the four micro-batches of a step, and the validation's, are shared unevenly."""
    settings = {"layout.micro_batch": 2, **settings}
    alone, two, three = (train_on(size, f"on-{size}", kind, **settings) for size in (1, 2, 3))
    assert (alone.facts["ranks"], two.facts["ranks"], three.facts["ranks"]) == (1, 2, 3)
    phases = len(alone.facts["parameters"])
    assert len(curve(alone)) == 12 * phases + 3
    assert curve(two) == pytest.approx(curve(alone), rel=1e-5)
    assert curve(three) == pytest.approx(curve(alone), rel=1e-5)
    for file in alone.weights.iterdir():
        assert (two.weights / file.name).stat().st_size == file.stat().st_size


def interrupt_after(step: int, run: Path, ranks: list[BaseProcess]) -> None:
    """As torchrun and Slurm do: SIGTERM to every rank, but never at quite the same moment."""
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b'"loss"') < step:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for rank in reversed(ranks):
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGTERM)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    recipe: MakeRecipe, train_on: Callable[..., Run], tmp_path: Path, before: int, after: int
) -> None:
    """The micro-batch that one process decided on is too large for the share of two."""
    settings = {
        "training.budget": "60 steps",
        "training.optimizer": GENTLE,
        "training.average": {"half_life": "20 steps"},
        "layout.micro_batch": "auto",
        "layout.compile": "auto",
    }
    undisturbed = train_on(after, "undisturbed", **settings)
    ranks = start(write(recipe, tmp_path, "moved", **settings), before)
    interrupt_after(5, tmp_path / "moved", ranks)
    assert end(ranks) == [130] * before
    stopped = Run.open(tmp_path / "moved").facts
    assert (stopped["status"], stopped["ranks"]) == ("interrupted", before)
    assert 5 <= stopped["step"] < 60
    moved = train_on(after, "moved", **settings)
    assert moved.facts["ranks"] == after
    assert curve(moved) == pytest.approx(curve(undisturbed), rel=1e-5)


def test_a_users_mistake_that_one_rank_finds_ends_all_of_them_with_one_line(
    recipe: MakeRecipe, train_on: Callable[..., Run], tmp_path: Path
) -> None:
    train_on(1, "taken", **{"training.budget": "2 steps"})
    mistakes = {
        "another recipe": ({"training.budget": "3 steps"}, "holds another run: training.budget: 2 steps -> 3 steps"),
        "no store": ({"data.store": str(tmp_path / "none"), "data.sources": []}, "the recipe names no sources"),
    }
    for changes, message in mistakes.values():
        file = write(recipe, tmp_path, "taken", **changes)
        for path in tmp_path.glob("taken.yaml.rank-*"):
            path.unlink()
        assert end(start(file, 3), seconds=30) == [2, 2, 2]
        [line] = printed(file).splitlines()
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.slow
def test_the_same_command_runs_under_torchrun(recipe: MakeRecipe, tmp_path: Path) -> None:
    file = write(recipe, tmp_path, "launched", **{"training.budget": "2 steps", "layout.micro_batch": 4})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "genscale", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, best validation loss") == 1  # from one of the two
    assert Run.open(tmp_path / "launched").facts["ranks"] == 2

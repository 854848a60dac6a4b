"""torchrun restarts a run whose ranks are killed, on as many ranks or fewer, and the loss curve stays what it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from layouts import assert_same_curve, train_all

from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run

MakeRecipe = Callable[..., Recipe]

SETTINGS: dict[str, Any] = {
    "training.budget": "40 steps",
    "training.optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "training.validation.every": "20 steps",
    "training.checkpoints.every": "2 steps",
    "layout.micro_batch": 2,
}
KILLS = int(os.environ.get("GENSCALE_TEST_KILLS", "2"))
"""Ten take six minutes of two cores."""


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"learning_rate"') if file.exists() else 0


def workers(launcher: psutil.Process) -> list[psutil.Process]:
    return [child for child in launcher.children() if "genscale" in " ".join(child.cmdline())]


def launch(file: Path, ranks: int, restarts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "genscale", "train", str(file), "--json"]
    log = open(file.with_suffix(f".log-{ranks}"), "w")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_one_rank(launcher: subprocess.Popen[str], run: Path, after: int, chance: random.Random) -> None:
    """SIGKILL to a random rank at a random moment after so many steps."""
    deadline = time.monotonic() + 120
    while steps_logged(run) < after:
        assert launcher.poll() is None, "the run ended before it was disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    found = workers(psutil.Process(launcher.pid))
    if found:
        os.kill(chance.choice(found).pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_ends_by_itself_with_the_curve_of_an_undisturbed_one(
    recipe_of: MakeRecipe, tmp_path: Path
) -> None:
    chance = random.Random(0)
    make = lambda name: recipe_of("causal", **SETTINGS, run=str(tmp_path / name))  # noqa: E731
    alone = train_all({"alone": make("alone")}, 1, tmp_path)["alone"]
    for number in range(KILLS):
        file = tmp_path / f"killed-{number}.yaml"
        file.write_text(recipe_to_yaml(make(file.stem)))
        launcher = launch(file, ranks=4, restarts=3)
        kill_one_rank(launcher, tmp_path / file.stem, after=chance.randrange(2, 36), chance=chance)
        assert launcher.wait(timeout=180) == 0, file.with_suffix(".log-4").read_text()[-3000:]
        run = Run.open(tmp_path / file.stem)
        assert any(event["kind"] == "resume" for event in run.events())
        assert_same_curve(run, alone)


@pytest.mark.slow
def test_it_goes_on_with_three_ranks_and_then_with_two(recipe_of: MakeRecipe, tmp_path: Path) -> None:
    chance = random.Random(1)
    make = lambda name: recipe_of("causal", **SETTINGS, run=str(tmp_path / name))  # noqa: E731
    alone = train_all({"alone": make("alone")}, 1, tmp_path)["alone"]
    file = tmp_path / "fewer.yaml"
    file.write_text(recipe_to_yaml(make("fewer")))
    for ranks, after in ((4, 8), (3, 20)):
        launcher = launch(file, ranks, restarts=0)
        kill_one_rank(launcher, tmp_path / "fewer", after, chance)
        assert launcher.wait(timeout=120) != 0
    assert launch(file, 2, restarts=0).wait(timeout=120) == 0
    run = Run.open(tmp_path / "fewer")
    assert run.facts["ranks"] == 2
    assert_same_curve(run, alone)

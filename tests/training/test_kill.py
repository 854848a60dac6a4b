"""Acceptance: a run that is killed again and again ends with the weights, to the bit, of one that never was.

Each life of the run is the real command in a process of its own, ended by SIGKILL. Some are started afresh, as a user
does, to be killed while Python still imports; the others are forked from a server that has torch imported already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from genscale.cli.main import main
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import CheckpointStore

STEPS = 300
CASES = {
    "killed": ("causal", 20, False),
    "killed-and-torn": ("causal", 20, True),
    "diffusion": ("flow", 8, True),
    "gan": ("adversarial", 8, False),
}
"""Objective, number of kills, and whether checkpoints are torn in between."""
TIMINGS = ("seconds", "checkpoint_pause_seconds", "samples_per_second", "tokens_per_second", "utilisation")

Life = subprocess.Popen[bytes] | BaseProcess


STATEFUL: dict[str, dict] = {
    "causal": {"model.dropout": 0.1, "training.optimizer": {"kind": "muon", "learning_rate": 0.02}},
    "flow": {
        "model.dropout": 0.1,
        "training.average": {"kind": "power", "lengths": [0.05, 0.1], "snapshot_every": "30 steps"},
    },
    "adversarial": {
        "objective.augmentation": {"translate": 0.2, "target": 0.6, "speed": "500 samples"},
        "objective.path_length": 0.1,
        "objective.lazy": 2,
    },
}
"""What has a state besides weights: two optimizers, dropout, several averages, controls that adapt, lazy phases."""


def write_recipe(make: Callable[..., Recipe], kind: str, folder: Path, name: str) -> Path:
    """With everything that has a state, and an average, a guard, early stopping, a best one."""
    recipe = make(
        kind,
        run=str(folder / name),
        **{
            "training.average": {"half_life": "10%"},
            **STATEFUL[kind],
            "training.budget": f"{STEPS} steps",
            "training.validation.every": "20 steps",
            "training.checkpoints": {"every": "7 steps", "keep_every": "100 steps"},
            "training.early_stopping": {"patience": 100},
        },
    )
    file = folder / f"{name}.yaml"
    file.write_text(recipe_to_yaml(recipe))
    return file


def start(file: Path, afresh: bool) -> Life:
    if afresh:
        command = [sys.executable, "-m", "genscale", "train", str(file)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genscale.training.run", "genscale.cli.train"])
    life = context.Process(target=main, args=(["train", str(file), "--json"],))
    life.start()
    return life


def exit_code(life: Life) -> int | None:
    return life.poll() if isinstance(life, subprocess.Popen) else life.exitcode


def end(life: Life, seconds: float = 60) -> int | None:
    if isinstance(life, subprocess.Popen):
        return life.wait(seconds)
    life.join(seconds)
    return life.exitcode


def last_step(run: Path) -> int:
    """As ``metrics.jsonl`` has it; the line after the last newline may be torn."""
    if not (run / "metrics.jsonl").exists():
        return 0
    with open(run / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"}\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def moments(dice: random.Random, run: Path, kills: int) -> list[tuple[bool, Callable[[], bool], float]]:
    """Of each life: is it started afresh, what is waited for, and how many seconds later it is killed."""

    def from_step(step: int) -> Callable[[], bool]:
        return lambda: last_step(run) >= step

    def writing(step: int) -> Callable[[], bool]:
        return lambda: last_step(run) >= step and any(run.glob("checkpoints/.step-*.aside"))

    def in_training(number: int, step: int) -> tuple[bool, Callable[[], bool], float]:
        if number % 4 == 3:
            return False, writing(step), dice.uniform(0, 0.01)
        return False, from_step(step), dice.uniform(0, 0.05)

    def at_once() -> bool:
        return True

    steps = sorted(dice.sample(range(1, STEPS - 10), kills - 6))
    inside = [in_training(number, step) for number, step in enumerate(steps)]
    middle = len(inside) // 2
    return [
        (True, at_once, dice.uniform(0, 4)),
        (False, at_once, dice.uniform(0, 0.5)),
        *inside[:middle],
        (True, at_once, dice.uniform(0, 4)),
        *inside[middle:],
        (False, from_step(STEPS), dice.uniform(0, 0.05)),
        (False, lambda: (run / f"checkpoints/step-{STEPS:08}").exists(), 0.0),
        (False, lambda: (run / "weights").exists(), 0.0),
    ]


def tear_newest(run: Path, dice: random.Random) -> None:
    """Cut a file of the newest intact checkpoint short; one intact checkpoint is left."""
    store = CheckpointStore(run / "checkpoints")
    intact = []
    for step in store.steps():
        try:
            store.load(step)
        except UserError:
            continue
        intact.append(step)
    if len(intact) > 1:
        file = dice.choice(sorted((run / f"checkpoints/step-{intact[-1]:08}").iterdir()))
        os.truncate(file, dice.randrange(file.stat().st_size))


def without_timings(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "wanted_kills", "torn"), CASES.values(), ids=list(CASES))
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(
    recipe_of: Callable[..., Recipe],
    tmp_path: Path,
    kind: str,
    wanted_kills: int,
    torn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed process leaves its temporary folder
    assert end(start(write_recipe(recipe_of, kind, tmp_path, "undisturbed"), afresh=False)) == 0
    expected = Run.open(tmp_path / "undisturbed")

    file, folder = write_recipe(recipe_of, kind, tmp_path, "killed"), tmp_path / "killed"
    dice = random.Random(20 + torn)
    kills = 0
    waiting = moments(dice, folder, wanted_kills)
    while kills < wanted_kills:  # a life may also end before its moment comes
        afresh, moment, delay = waiting.pop(0) if waiting else (False, lambda: True, 0.0)
        life = start(file, afresh)
        deadline = time.monotonic() + 60
        while not moment() and exit_code(life) is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        assert life.pid is not None
        os.kill(life.pid, signal.SIGKILL)
        code = end(life)
        assert code in (-signal.SIGKILL, 0)
        kills += code == -signal.SIGKILL
        if torn and kills % 3 == 2:
            tear_newest(folder, dice)
    assert end(start(file, afresh=True)) == 0
    run = Run.open(folder)
    assert run.facts["status"] == "finished"
    assert run.facts["best"] == expected.facts["best"]

    for which in ("last", "best"):
        found, wanted = (CheckpointStore(each.checkpoints).load(which) for each in (run, expected))
        assert found.step == wanted.step
        assert found.tensors.keys() == wanted.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert torch.equal(found.tensors[name], tensor), (which, name)
    for kept in ("weights/*.safetensors", "averages/*", "samples/*"):
        files = [sorted(each.directory.glob(kept)) for each in (run, expected)]
        assert [file.name for file in files[0]] == [file.name for file in files[1]]
        for file, wanted_file in zip(*files, strict=True):
            assert file.read_bytes() == wanted_file.read_bytes(), file

    losses = [record["step"] for record in run.metrics() if "learning_rate" in record]
    assert losses == list(range(1, STEPS + 1))
    assert without_timings(run.metrics()) == without_timings(expected.metrics())
    assert run.samples() == expected.samples()

    kinds = [event["kind"] for event in run.events()]
    assert kinds.count("resume") >= wanted_kills // 2
    assert ("damaged_checkpoint" in kinds) == torn
    assert [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".replaced"] == []

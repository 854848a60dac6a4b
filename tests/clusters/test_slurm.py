"""Slurm: the script that is submitted, and real jobs on two nodes, one of them preempted and requeued."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genscale.clusters.slurm import SlurmJob, job_script
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.errors import UserError

MakeRecipe = Callable[..., Recipe]


def genscale(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genscale", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_is_asked():
    job = SlurmJob(
        "8b", 16, 8, 8, time="24:00:00", partition="h100", account="a", options=("--constraint=ib",), grace=90
    )
    assert directives(job_script(job, ["true"])) == [
        "--job-name=8b",
        "--nodes=16",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        "--partition=h100",
        "--account=a",
        "--output=8b-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@90",
        "--constraint=ib",
    ]


def test_the_script_is_bash_that_runs_the_command_as_it_was_typed(tmp_path):
    """With commands in Slurm's place: srun runs one task, after which the job is or is not running any more."""
    words = ["a b", "it's", "$HOME", '"q"', "*", "\\"]
    for name, line in {"srun": 'shift 2; exec "$@"', "squeue": "echo RUNNING", "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    program = "import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(130)"
    script = job_script(SlurmJob("x"), [sys.executable, "-c", program, *words])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [json.dumps(words), "requeue 7"]
    assert done.returncode == 130


@pytest.mark.parametrize(
    ("codes", "state", "starts", "requeued"),
    [
        ([0], "RUNNING", 1, False),
        ([2], "RUNNING", 1, False),
        ([1, 137, 0], "RUNNING", 3, False),
        ([1, 1, 1, 1], "RUNNING", 4, False),
        ([1], "COMPLETING", 1, False),
        ([130], "RUNNING", 1, True),
        ([143], "RUNNING", 1, True),
        ([1, 130], "RUNNING", 2, True),
        ([130], "COMPLETING", 1, False),
    ],
)
def test_a_crash_is_started_again_and_an_interrupted_job_is_requeued_unless_slurm_has_ended_it(
    codes, state, starts, requeued, tmp_path
):
    counted = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n"
    ended = f"codes=({' '.join(map(str, codes))}); exit ${{codes[$n]}}"
    for name, line in {
        "srun": f"{counted}; {ended}",
        "squeue": f"echo {state}",
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=job_script(SlurmJob("x"), ["true"]), text=True, env=environment)
    assert done.returncode == codes[-1]
    assert int((tmp_path / "n").read_text()) == starts
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize("change", [{"partition": "a\n#SBATCH --uid=0"}, {"time": "1 day"}, {"options": ("x",)}])
def test_an_option_cannot_become_another_one(change):
    with pytest.raises(UserError, match="expected"):
        job_script(SlurmJob("x", **change), ["true"])


def test_a_dry_run_prints_the_script_and_submits_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "tiny",
        "--on",
        "slurm",
        "--nodes",
        "2",
        "--processes-per-node",
        "4",
        "training.budget=2 epochs",
        "--dry-run",
    )
    done = genscale("train", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(directives(done.stdout))
    assert "-m genscale train tiny 'training.budget=2 epochs'\n" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert os.listdir(tmp_path) == []
    on_the_cpu = genscale("train", "tiny", "--on", "slurm", "layout.device=cpu", "--dry-run")
    assert "--gpus" not in on_the_cpu.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "slurm", "--nodes", "2"], "sbatch is not installed here; run this where Slurm is"),
        (["--on", "slurm", "--nodes", "0"], "Invalid value for '--nodes': 0 is not in the range x>=1."),
        (["--on", "slurm", "--hosts", "a,b"], "--hosts goes with --on ssh"),
        (["--on", "pbs"], "Invalid value for '--on': 'pbs' is not one of 'slurm', 'ssh'."),
        (["--nodes", "2"], "--nodes goes with --on slurm or --on ssh"),
        (["--dry-run"], "--dry-run goes with --on slurm or --on ssh"),
        (["--on", "slurm", "--sbatch", "x", "--dry-run"], "--sbatch: expected an option of sbatch"),
        (["--on", "slurm", "--nodes", "3", "layout.shard=2"], "layout"),
        (["--on", "slurm", "model.layerz=3"], "did you mean 'layers'?"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = genscale("train", "tiny", *words, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# On a real Slurm; the fixture is in conftest.py

PATIENT = {
    "training.budget": "200 steps",
    "training.batch": "8 samples",
    "training.optimizer": {"kind": "adamw", "learning_rate": 1e-3},
    "training.validation": {"every": "50 steps", "amount": "8 samples"},
    "training.checkpoints": {"every": "1000 steps"},  # so that only an interruption saves
    "model.context": 128,
    "model.width": 64,
    "layout.micro_batch": 4,
}


def state(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait_for(true: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"{log} is not there"
        time.sleep(0.2)


class Submitted:
    """A run that was submitted from the current folder."""

    def __init__(self, recipe: Recipe):
        file = Path(f"{recipe.name}.yaml")
        file.write_text(recipe_to_yaml(recipe))
        done = genscale("train", str(file), "--on", "slurm", "--nodes", "2", "--partition", "normal", "--time", "10")
        assert done.returncode == 0, done.stderr
        first, following = done.stdout.splitlines()
        self.job = re.fullmatch(rf"job (\d+) of {recipe.name}\.sbatch; its log: \S+", first)[1]  # type: ignore[index]
        assert f"scancel {self.job}" in following
        self.log = Path(f"{recipe.name}-{self.job}.log")
        self.directory = Path(recipe.run_directory)

    def steps(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_bytes().count(b'"learning_rate"') if metrics.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        wait_for(lambda: self.steps() >= steps, self.log)

    def end(self) -> Run:
        wait_for(lambda: state(self.job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), self.log)
        assert (state(self.job)["JobState"], state(self.job)["ExitCode"]) == ("COMPLETED", "0:0"), self.log.read_text()
        return Run.open(self.directory)


def curve(run: Run) -> list[float]:
    records = run.metrics()
    return [record[name] for name in ("loss", "validation_loss") for record in records if name in record]


@pytest.mark.slow
def test_a_job_that_is_preempted_and_requeued_ends_as_one_that_was_left_alone(
    slurm: Path, recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    undisturbed = Submitted(recipe(**PATIENT, name="undisturbed", run=str(tmp_path / "undisturbed"))).end()
    moved = Submitted(recipe(**PATIENT, name="moved", run=str(tmp_path / "moved")))

    moved.wait_for_steps(5)  # a job of a better partition needs the nodes; Slurm tells this one, and gives it a while
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true"]
    assert subprocess.run(urgent, capture_output=True).returncode == 0
    wait_for(lambda: state(moved.job)["JobState"] == "PENDING", moved.log)
    preempted = Run.open(moved.directory).facts
    assert (preempted["status"], preempted["ranks"]) == ("interrupted", 2), moved.log.read_text()

    moved.wait_for_steps(preempted["step"] + 5)  # Slurm ends it at once, and may signal a process twice
    assert subprocess.run(["scontrol", "requeue", moved.job]).returncode == 0
    wait_for(lambda: state(moved.job)["JobState"] == "PENDING", moved.log)
    requeued = Run.open(moved.directory).facts
    assert requeued["status"] == "interrupted", moved.log.read_text()

    run = moved.end()
    events = (moved.directory / "events.jsonl").read_text()
    for facts in (preempted, requeued):
        assert f"going on from step {facts['step']} of 200" in events
    assert 5 <= preempted["step"] < requeued["step"] < 200
    assert state(moved.job)["Restarts"] == "2"
    assert len(curve(run)) == 200 + 4
    assert curve(run) == pytest.approx(curve(undisturbed), rel=1e-5)

"""Training as a Slurm job that saves before it must go, and goes on by itself."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genscale.runs.disk import writing
from genscale.runtime.errors import UserError

_SCRIPT = """\
#!/bin/bash
{directives}

# Where Slurm ends the job it signals this shell as well, which has to stay until the processes have saved.
trap : TERM

running() {{ [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; }}

# One task is one process, without torchrun between: it would send each of them a second SIGTERM, end them after thirty
# seconds, and hide how they ended. One that leaves first must not end the others, which are about to save.
for ((start = 0; start <= {restarts}; start++)); do
    srun --kill-on-bad-exit=0 --wait={grace} {step}\\
        {command}
    code=$?
    case $code in
    0 | 2) exit $code ;; # done, or a mistake in the recipe
    130 | 143) # interrupted, and not by scancel or by a preemption that requeues: time was up, or grace was given
        running || exit $code
        scontrol requeue "$SLURM_JOB_ID" || echo "cannot be requeued; the same sbatch goes on from here"
        exit $code
        ;;
    esac
    running || exit $code
    echo "ended with code $code, start $((start + 1)) of {starts}"
done
exit $code
"""


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm."""

    name: str
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as it stands after ``#SBATCH``: ``--constraint=h100``."""
    grace: int = 120
    """Seconds before the end of its time at which the job is told to save."""
    restarts: int = 3
    """Fresh starts after a crash, in one allocation."""


def job_script(job: SlurmJob, command: Sequence[str]) -> str:
    """The script that ``sbatch`` takes; each process of the job runs the command."""
    given = {"time": job.time, "partition": job.partition, "account": job.account}
    for name, value in given.items():
        if value is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
            raise UserError(f"--{name}: expected one word, found {value!r}")
    for option in job.options:
        if not re.fullmatch(r"-[^\n\r]+", option):
            raise UserError(f"--sbatch: expected an option of sbatch such as --constraint=h100, found {option!r}")
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        f"--output={job.name}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{job.grace}",
        *job.options,
    ]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        restarts=job.restarts,
        starts=job.restarts + 1,
        grace=job.grace,
        step="${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} ",  # srun no longer takes it from sbatch
        command=shlex.join(command),
    )


def submit(script: str, file: Path) -> str:
    """Write the script to ``file`` and hand it to sbatch; the job's id."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed here; run this where Slurm is, or print the script with --dry-run")
    with writing(file):
        file.write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise UserError(f"sbatch refused {file}: {told[-1].removeprefix('sbatch: error: ')}")
    return done.stdout.strip().partition(";")[0]

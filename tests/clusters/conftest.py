"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with all that they write in a temp folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small import recipe, small_store

__all__ = ["recipe", "small_store"]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again; two minutes if not set.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Processes meet at the first node's name, which has to lead to this machine.
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=normal Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=127.0.0.[1-2] PriorityTier=10 PreemptMode=OFF
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def daemon(name: str) -> str:
    """The daemon's path; skips the test where it is not installed."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed; .ci/slurm installs Slurm")
    return path


def wait_until(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running Slurm with two nodes, for whose commands SLURM_CONF is set.

    Partition ``urgent`` preempts ``normal``, whose jobs are told 20 seconds before.
    """
    munged, slurmctld, slurmd = map(daemon, DAEMONS)
    folder = tmp_path_factory.mktemp("slurm")
    controller, first, second = free_ports(3)
    (folder / "state").mkdir()
    # Slurm wants control groups in any case; nothing here uses them, so that it may look for them in the folder.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname(),
            user=getpass.getuser(),
            controller=controller,
            first=first,
            second=second,
        )
    )
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    conf = ["-D", "-f", str(folder / "slurm.conf")]
    commands = [
        [munged, "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        [slurmctld, *conf],
        [slurmd, *conf, "-N", "127.0.0.1"],
        [slurmd, *conf, "-N", "127.0.0.2"],
    ]
    with pytest.MonkeyPatch.context() as patch, (folder / "daemons.log").open("w") as log:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        started: list[subprocess.Popen] = []
        try:
            for command in commands:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
                if command[0] == munged:
                    wait_until((folder / "munge.socket").exists, "munged", 10)
            wait_until(nodes_are_idle, f"two idle nodes (see {folder})", 30)
            yield folder
        finally:
            if len(started) == len(commands):
                end_jobs()
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def end_jobs() -> None:
    """What a failed test has left; a job outlives the daemons."""
    subprocess.run(["scancel", "--quiet", "--user", getpass.getuser(), "--state", "PENDING"], capture_output=True)
    subprocess.run(["scancel", "--user", getpass.getuser(), "--signal", "KILL", "--full"], capture_output=True)
    deadline = time.monotonic() + 15
    while subprocess.run(["squeue", "--noheader"], capture_output=True).stdout and time.monotonic() < deadline:
        time.sleep(0.2)


def nodes_are_idle() -> bool:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t", "-p", "normal"], capture_output=True, text=True)
    return done.stdout.split() == ["idle", "idle"]

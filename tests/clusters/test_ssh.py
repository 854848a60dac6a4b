"""Hosts over ssh, with an ssh in its place that runs what it is given in a shell of this machine, as sshd would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genscale.clusters.ssh import Hosts, host_names, run_on_hosts
from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.errors import UserError

FAKE_SSH = """#!/bin/sh
# ssh -T -o BatchMode=yes HOST COMMAND
[ "$#" = 5 ] || exit 9
[ "$4" = unreachable ] && { echo "ssh: connect to host unreachable port 22: No route to host" >&2; exit 255; }
cd / && exec sh -c "$5"
"""


@pytest.fixture(autouse=True)
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(FAKE_SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], tuple]:
    """``told("host1,host2", program)``: what run_on_hosts returns, and the lines that it told, with a Python program in
    torchrun's place."""

    def told(names: str, program: str) -> tuple:
        monkeypatch.setattr(Hosts, "torchrun", lambda self, index: [sys.executable, "-u", "-c", program, str(index)])
        lines: list[str] = []
        return run_on_hosts(Hosts(host_names(names)), ["a b", "it's"], os.environ, lines.append), sorted(lines)

    return told


def genscale(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genscale", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=180)


def test_each_host_runs_the_command_in_this_folder_and_its_lines_bear_its_name(told, tmp_path):
    program = "import os, sys; print(sys.argv[1:], os.getcwd(), flush=True); print('done', file=sys.stderr)"
    failed, lines = told("left,right", program)
    assert failed is None
    words = "'a b', \"it's\""
    assert lines == [
        f"left: ['0', {words}] {tmp_path}",
        "left: done",
        f"right: ['1', {words}] {tmp_path}",
        "right: done",
    ]


def test_when_one_host_fails_the_others_are_told_to_save_and_end(told):
    program = """
import signal, sys, time
def save(*signals):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if sys.argv[1] == "1":
    time.sleep(0.5)
    sys.exit(7)
time.sleep(60)
"""
    start = time.monotonic()
    failed, lines = told("left,right", program)
    assert failed == ("right", 7)
    assert lines == ["left: saved"]
    assert time.monotonic() - start < 30


def test_a_host_saves_when_the_connection_is_gone():
    """As when the machine that started it is switched off: nobody sends a signal, standard input just ends."""
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("up", flush=True)
time.sleep(60)
"""
    hosts = Hosts(("left",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hosts, "torchrun", lambda self, index: [sys.executable, "-c", program])
        command = hosts.command(0, [], os.environ)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(30) == 3
    process.stdout.close()


def test_torchrun_knows_its_place_and_is_patient():
    hosts = Hosts(("me@first", "second"), processes_per_node=8, port=23456, folder="/work dir")
    remote = hosts.command(1, ["-m", "genscale"], {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/a b", "SECRET": "x"})[-1]
    assert remote.startswith(
        "cd '/work dir' && env NCCL_DEBUG=INFO 'PYTHONPATH=/a b' TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"
    )
    assert "--nnodes=2 --node-rank=1 --nproc-per-node=8 --master-addr=first --master-port=23456 -m genscale" in remote
    assert "SECRET" not in remote


def test_a_dry_run_prints_the_commands():
    done = genscale("train", "tiny", "--on", "ssh", "--hosts", "left,right", "--processes-per-node", "2", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("ssh -T -o BatchMode=yes ") == 2
    assert done.stdout.count("-m genscale train tiny") == 2


@pytest.mark.parametrize("names", ["", "a,", "a b", "-oProxyCommand=x", "a,,b"])
def test_a_list_that_names_no_hosts(names):
    with pytest.raises(UserError, match="expected names such as host1,host2"):
        host_names(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "ssh"], "--on ssh needs --hosts host1,host2"),
        (["--on", "ssh", "--hosts", "a,a"], "a stands there twice"),
        (["--on", "ssh", "--hosts", "a,b", "--nodes", "2"], "--nodes goes with --on slurm"),
        (["--on", "ssh", "--hosts", "unreachable"], "unreachable: cannot be reached by ssh"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    done = genscale("train", "tiny", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_machine_without_ssh(tmp_path):
    done = genscale("train", "tiny", "--on", "ssh", "--hosts", "a,b", PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (2, "error: ssh is not installed here\n")


def command(recipe: Recipe, **changed: str) -> list[str]:
    """Two hosts that are both this machine: the names lead to it."""
    Path("small.yaml").write_text(recipe_to_yaml(recipe))
    return ["train", "small.yaml", "--on", "ssh", "--hosts", "127.0.0.1,127.0.0.2"]


@pytest.mark.slow
def test_two_hosts_train_one_model(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    done = genscale(*command(recipe(**{"training.budget": "2 steps", "layout.micro_batch": 4})))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "127.0.0.1: " in done.stdout
    assert done.stdout.count("2 steps, best validation loss") == 1
    assert (Run.open(tmp_path / "run").facts["ranks"], Run.open(tmp_path / "run").facts["step"]) == (2, 2)


@pytest.mark.slow
def test_ctrl_c_saves_on_all_hosts(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = {
        "training.budget": "20000 steps",
        "training.checkpoints": {"every": "20000 steps"},
        "layout.micro_batch": 4,
    }
    words = [sys.executable, "-m", "genscale", *command(recipe(**settings))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b'"loss"') < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip()) == (130, "interrupted; the same command goes on from here"), out
    facts = Run.open(tmp_path / "run").facts
    assert facts["status"] == "interrupted"
    assert facts["step"] >= 3

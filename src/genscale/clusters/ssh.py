"""Training on hosts that are reached over ssh: torchrun on each, what they print in one place, and one end for all."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from genscale.runtime.errors import UserError

GRACE = 600
"""Seconds that processes have to save and end, once they are told to."""

_SUPERVISE = """\
exec 3<&0
"$@" 3<&- </dev/null & child=$!
{ cat <&3; kill -TERM $child; } >/dev/null 2>&1 & watcher=$!
wait $child; code=$?
kill $watcher 2>/dev/null
exit $code
"""
"""Runs a command until its end, or until standard input ends: then SIGTERM. So that it ends as well, having saved, when
the connection breaks or the machine from which it was started is gone."""

_FORWARDED = ("PYTHONPATH", "OMP_NUM_THREADS")
_FORWARDED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "CUDA_")


class Ended(NamedTuple):
    """The first host that failed, and its exit code."""

    host: str
    code: int


def host_names(text: str) -> tuple[str, ...]:
    """From ``host1,host2``. Raises UserError for a list that names none, or one of them twice."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or name.startswith("-") or any(letter.isspace() for letter in name):
            raise UserError(f"--hosts: expected names such as host1,host2, found {text!r}")
        if names.count(name) > 1:
            raise UserError(f"--hosts: {name} stands there twice; several processes on it: --processes-per-node")
    return names


@dataclass(frozen=True)
class Hosts:
    """The machines, and how torchrun is started on them."""

    names: tuple[str, ...]
    """As ssh takes them; at the first one, without its user, the processes meet."""
    processes_per_node: int = 1
    port: int = field(default_factory=lambda: random.randint(20_000, 29_999))
    """Where the processes meet; below the range that kernels hand out."""
    folder: str = field(default_factory=os.getcwd)

    def torchrun(self, index: int) -> list[str]:
        """How torchrun is started on one host, without what it runs."""
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={len(self.names)}",
            f"--node-rank={index}",
            f"--nproc-per-node={self.processes_per_node}",
            f"--master-addr={self.names[0].rpartition('@')[2]}",
            f"--master-port={self.port}",
        ]

    def command(self, index: int, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """The ssh command of one host; ``words`` are what torchrun runs."""
        forwarded = {
            name: value
            for name, value in sorted(environment.items())
            if name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES)
        } | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE)}
        settings = [f"{name}={value}" for name, value in forwarded.items()]
        supervised = shlex.join(["env", *settings, "sh", "-c", _SUPERVISE, "sh", *self.torchrun(index), *words])
        # No terminal, and no question that nobody would answer.
        return ["ssh", "-T", "-o", "BatchMode=yes", self.names[index], f"cd {shlex.quote(self.folder)} && {supervised}"]


def run_on_hosts(
    hosts: Hosts, words: Sequence[str], environment: Mapping[str, str], tell: Callable[[str], None]
) -> Ended | None:
    """Run the command on all hosts to the end; the first to fail ends the others, having saved. None when all succeed.

    Each line that a host prints is told with its name before it. On Ctrl-C and SIGTERM all hosts save and end, and
    KeyboardInterrupt is raised.
    """
    if shutil.which("ssh") is None:
        raise UserError("ssh is not installed here")
    commands = [hosts.command(index, words, environment) for index in range(len(hosts.names))]
    started: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    with _sigterm_as_ctrl_c():
        try:
            for host, command in zip(hosts.names, commands, strict=True):
                # In sessions of their own, so that Ctrl-C does not cut the connections through which they are told.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                started.append(process)
                readers.append(threading.Thread(target=_read, args=(process, host, tell, lock), daemon=True))
                readers[-1].start()
            failed = _first_failure(hosts.names, started)
        finally:
            _end(started)
            for reader in readers:
                reader.join(5)
    return failed


def _first_failure(names: Sequence[str], started: Sequence[subprocess.Popen[bytes]]) -> Ended | None:
    """Wait until one has failed or all have succeeded."""
    while True:
        codes = [process.poll() for process in started]
        for name, code in zip(names, codes, strict=True):
            if code:
                return Ended(name, code)
        if None not in codes:
            return None
        time.sleep(0.1)


def _read(process: subprocess.Popen[bytes], host: str, tell: Callable[[str], None], lock: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with lock:
            tell(f"{host}: {line.decode(errors='replace').rstrip()}")


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close what the hosts read, at which they save and end; those that do not are cut off."""
    for process in started:
        assert process.stdin is not None
        process.stdin.close()
    deadline = time.monotonic() + GRACE + 30
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C acts at once
            deadline = 0.0
            process.kill()
            process.wait()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """As whoever stops this process from outside means the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

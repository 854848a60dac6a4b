"""Real processes on gloo: a program on several ranks, and how each of them ends, seen from outside."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

PRELOADED = ["torch._dynamo", "genscale.training.run", "genscale.cli.train", "genscale.runtime.watch"]


class Ended(NamedTuple):
    """How a rank ended."""

    code: int | None
    """None for one that had to be killed at the end of the time."""
    printed: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Ranks:
    """Processes that run the same program; ``rank`` is set in it.

    >>> Ranks("print(rank)", size=2).end()  # doctest: +SKIP
    """

    def __init__(
        self, program: str, size: int, environment: Mapping[str, str] | None = None, ranks: list[int] | None = None
    ):
        context = multiprocessing.get_context("forkserver")  # torch is imported once, in the server
        context.set_forkserver_preload(PRELOADED)
        self._folder = Path(tempfile.mkdtemp())
        self.port = free_port()
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self.files = {rank: self._folder / f"rank-{rank}" for rank in (range(size) if ranks is None else ranks)}
        self.processes: dict[int, BaseProcess] = {}
        for rank, file in self.files.items():
            own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes[rank] = context.Process(target=_life, args=(program, rank, own, file))
            self.processes[rank].start()

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def wait_until_printed(self, text: str, rank: int, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not self.files[rank].exists() or text not in self.files[rank].read_text():
            assert time.monotonic() < deadline, self.files[rank].read_text()
            time.sleep(0.02)

    def end(self, seconds: float = 30, but: int | None = None) -> dict[int, Ended]:
        """Wait for all, or all but one; those that have not ended are killed."""
        deadline = time.monotonic() + seconds
        for rank, process in self.processes.items():
            if rank != but:
                process.join(max(0.0, deadline - time.monotonic()))
        codes = {rank: process.exitcode for rank, process in self.processes.items()}
        for process in self.processes.values():
            process.kill()
            process.join()
        return {rank: Ended(codes[rank], file.read_text()) for rank, file in self.files.items()}


def lines(ended: Mapping[int, Ended]) -> list[str]:
    """What all ranks printed, without the markers ``> ...`` of the programs themselves."""
    return [line for rank in ended.values() for line in rank.printed.splitlines() if not line.startswith(">")]


def codes(ended: Mapping[int, Ended]) -> list[int | None]:
    return [rank.code for rank in ended.values()]


def _life(program: str, rank: int, environment: dict[str, str], file: Path) -> None:
    """One rank: as the command line ends a failure, with what it prints in a file."""
    from genscale.runtime.errors import UserError

    os.environ.update(environment)
    printed = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    try:
        exec(program, {"rank": rank, "__name__": "rank"})
    except UserError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        sys.exit(130)

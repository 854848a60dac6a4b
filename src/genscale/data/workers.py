"""Worker processes for work units: ``python -m genscale.data.workers``, spoken to through pipes.

They are programs of their own rather than children of ``multiprocessing``: forking a process that has loaded torch is
dangerous, and spawning would run the user's own script a second time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from genscale.runtime.errors import UserError

_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_TICK = 1 << 22  # bytes of work between two reports of progress


Tick = Callable[[int], None]
"""Told of each bite of work done, in bytes."""


class Job(Protocol):
    """A work unit with what is to be done to it; may be sent to another process."""

    @property
    def number(self) -> int: ...

    @property
    def size(self) -> int:
        """Bytes of the sources, for progress."""

    @property
    def folder(self) -> Path:
        """Where its output goes."""

    @property
    def place(self) -> str:
        """The first file that it reads."""

    def perform(self, tick: Tick) -> Any:
        """Do it."""


Message = tuple[str, Job, Any]
"""Kind ("tick", "done", "user error", "disk full", "killed" or "error"), the job it is about, content."""


class Workers:
    """``count`` processes that perform jobs, started when there is work for them; with 0, this process does it.

    A context manager: leaving it ends the processes, whatever they are doing.
    """

    def __init__(self, count: int):
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            _close(process.stdin)
            _close(process.stdout)

    def run(self, jobs: Sequence[Job], tick: Callable[[int, int], None]) -> dict[int, Any]:
        """Perform all jobs. Returns each job's result by its unit's number.

        Args:
            jobs: the work.
            tick: told of progress: (unit number, bytes done since it was last told).

        Raises:
            UserError: from a job; the disk is full; or a worker was killed.
        """
        results = {}
        for kind, job, content in self._messages(jobs) if self.count else _perform_here(jobs):
            if kind == "tick":
                tick(job.number, content)
            elif kind == "done":
                results[job.number] = content
                tick(job.number, job.size)
            elif kind == "user error":
                raise UserError(content)
            elif kind == "disk full":
                raise disk_full(job.folder)
            elif kind == "killed":
                raise UserError(
                    f"a worker process ended ({content}) while it read {job.place}; if memory ran "
                    "out, use fewer workers; the same command goes on from here"
                )
            else:
                raise RuntimeError(f"a worker failed on {job.place}:\n{content}")
        return results

    def _messages(self, jobs: Sequence[Job]) -> Iterator[Message]:
        """What the workers say, until all jobs are done."""
        inbox: queue.Queue[Message | None] = queue.Queue()
        pending = iter(jobs)
        guard = threading.Lock()
        while len(self._processes) < min(self.count, len(jobs)):
            self._processes.append(_start())

        def attend(process: subprocess.Popen[bytes]) -> None:
            """One thread for each worker: hand it jobs, pass on what it says."""
            while True:
                with guard:
                    job = next(pending, None)
                if job is None:
                    inbox.put(None)
                    return
                for message in _converse(process, job):
                    inbox.put(message)
                    if message[0] == "killed":
                        return

        self._threads = [threading.Thread(target=attend, args=(process,), daemon=True) for process in self._processes]
        for thread in self._threads:
            thread.start()
        attending = len(self._threads)
        while attending:
            message = inbox.get()
            if message is None:
                attending -= 1
            else:
                yield message


def _perform_here(jobs: Sequence[Job]) -> Iterator[Message]:
    for job in jobs:
        try:
            result = job.perform(lambda done: None)
        except OSError as error:
            if not is_disk_full(error):
                raise
            yield "disk full", job, None
            return
        yield "done", job, result


def is_disk_full(error: BaseException) -> bool:
    """Also for pyarrow's errors, which may carry the reason in their text alone."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or (number is None and "No space left on device" in str(error))


def disk_full(folder: Path) -> UserError:
    return UserError(
        f"the disk is full: cannot write to {folder}; free some space, and the same command goes on from here"
    )


def _converse(process: subprocess.Popen[bytes], job: Job) -> Iterator[Message]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(job, process.stdin)
        process.stdin.flush()
        kind = "tick"
        while kind == "tick":
            kind, content = pickle.load(process.stdout)
            yield kind, job, content
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        code = process.wait()
        yield "killed", job, signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _close(pipe: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # a job was on its way to a worker that is gone
        pipe.close()


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "genscale.data.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
    )


def _serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """The worker's side: perform jobs until the pipe ends."""
    parent = os.getppid()
    for job in _received(jobs):
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if done >= _TICK:
                if os.getppid() != parent:  # an orphan: whoever goes on with the store does this unit again
                    os._exit(1)
                _answer(answers, "tick", done)
                done = 0

        try:
            result = job.perform(tick)
        except UserError as error:
            _answer(answers, "user error", str(error))
        except Exception as error:
            if is_disk_full(error):
                _answer(answers, "disk full", None)
            else:
                import traceback

                _answer(answers, "error", traceback.format_exc())
        else:
            _answer(answers, "done", result)


def _received(jobs: BinaryIO) -> Iterable[Job]:
    while True:
        try:
            yield pickle.load(jobs)
        except EOFError:
            return


def _answer(answers: BinaryIO, kind: str, content: Any) -> None:
    pickle.dump((kind, content), answers)
    answers.flush()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not fall between the answers
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()

"""Worker processes for work units: ``python -m genscale.data.workers``, spoken to through pipes.

They are programs of their own rather than children of ``multiprocessing``: forking a process that has loaded torch is
dangerous, and spawning would run the user's own script a second time.
"""

from __future__ import annotations

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
from typing import Any, BinaryIO

from genscale.data.units import Job
from genscale.data.work import perform
from genscale.runtime.errors import UserError

_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_TICK = 1 << 22  # bytes of work between two reports of progress


def run_jobs(jobs: Sequence[Job], workers: int, tick: Callable[[int, int], None]) -> dict[int, Any]:
    """Perform all jobs; with 0 workers in this process. Returns each job's result by its unit's number.

    Args:
        tick: told of progress: (unit number, bytes done since it was last told).

    Raises:
        UserError: from a job; the disk is full; or a worker was killed.
    """
    if not workers:
        return {job.unit.number: _perform_here(job, tick) for job in jobs}
    results = {}
    for kind, job, content in _messages(jobs, min(workers, len(jobs))):
        if kind == "tick":
            tick(job.unit.number, content)
        elif kind == "done":
            results[job.unit.number] = content
        elif kind == "user error":
            raise UserError(content)
        elif kind == "disk full":
            raise disk_full(job.folder)
        elif kind == "killed":
            raise UserError(
                f"a worker process ended ({content}) while it read {job.unit.pieces[0].file.url}; if memory ran out, "
                "use fewer workers; the same command goes on from here"
            )
        else:
            raise RuntimeError(f"a worker failed on {job.unit.pieces[0].file.url}:\n{content}")
    return results


def _perform_here(job: Job, tick: Callable[[int, int], None]) -> Any:
    try:
        return perform(job, lambda done: tick(job.unit.number, done))
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(job.folder) from None
        raise


def is_disk_full(error: BaseException) -> bool:
    """Also for pyarrow's errors, which may carry the reason in their text alone."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or (number is None and "No space left on device" in str(error))


def disk_full(folder: Path) -> UserError:
    return UserError(
        f"the disk is full: cannot write to {folder}; free some space, and the same command goes on from here"
    )


Message = tuple[str, Job, Any]


def _messages(jobs: Sequence[Job], workers: int) -> Iterator[Message]:
    """What the workers say, until all jobs are done. Ends the workers however it ends."""
    inbox: queue.Queue[Message | None] = queue.Queue()
    pending = iter(jobs)
    guard = threading.Lock()
    processes = [_start() for _ in range(workers)]

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

    threads = [threading.Thread(target=attend, args=(process,), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    try:
        attending = workers
        while attending:
            message = inbox.get()
            if message is None:
                attending -= 1
            else:
                yield message
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)


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
    try:
        pipe.close()
    except BrokenPipeError:  # a job was on its way to a worker that is gone
        return


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
            result = perform(job, tick)
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

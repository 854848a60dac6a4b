"""Watching the processes of a run: none may hang, die or fail without the others ending with one line that says so.

Each process has a thread that says twice a second, in the store that all share, where its process stands. A process
that fails says so there. The others see it even while they wait in a collective, which nothing can interrupt: where
the main thread does not end by itself, the watching thread ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from genscale.runtime import world
from genscale.runtime.errors import UserError
from genscale.runtime.failure import Failure, claim, claimed, exit_code, is_collective_failure, is_timeout
from genscale.runtime.flight import collectives_entered, dump_flight
from genscale.runtime.joining import Joined, SharedStore, StoreGone

_TICK = 0.5
_LOOK = 4
"""Ticks between two looks of rank 0 at all processes."""
_GRACE = 3.0
"""How long the main thread has to end by itself, releasing what it holds, before the process is ended."""
_LATE = 5.0
"""How much longer than a collective may take the watch waits: gloo's collectives end by themselves."""
_HEARD = 2.5
"""A process that lives says so within this time, on a busy machine as well."""


@dataclass(frozen=True)
class Report:
    """Where a process stands, as the others see it."""

    rank: int
    pid: int
    host: str
    beat: int = 0
    step: int | None = None
    phase: str = "start"
    together: bool = False
    still: float = 0.0
    """Seconds without a new place or another collective."""
    collectives: int = 0
    left: bool = False

    @property
    def who(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return self.phase if self.step is None else f"step {self.step + 1}, {self.phase}"


def behind(reports: list[Report]) -> str:
    """One line on which rank keeps the others waiting. Those that wait together wait for one that does not."""

    def order(report: Report) -> tuple[int, bool, int]:
        return (-1 if report.step is None else report.step, report.together, report.collectives)

    first = min(map(order, reports))
    late = [report for report in reports if order(report) == first]
    others = [report for report in reports if order(report) != first]
    if not others:
        return (
            f"no rank has moved for {min(report.still for report in late):.0f} s: all {len(late)} wait in "
            f"{late[0].place}; see the network between their hosts"
        )
    [(place, count)] = Counter(report.place for report in others).most_common(1)
    waiting = "the others wait" if count == len(others) else f"{count} of the others wait"
    one = late[0]
    if one.place == place:  # as far by its own account, but with fewer collectives behind it
        place += f", {others[0].collectives - one.collectives} collectives further"
    more = f", as {len(late) - 1} more ranks," if len(late) > 1 else ""
    return f"{one.who}{more} has not moved for {one.still:.0f} s: it stands in {one.place}; {waiting} in {place}"


class Watch:
    """A process's own account of where it stands; made by :func:`watching`."""

    def __init__(self, rank: int = 0):
        self._place: tuple[int | None, str, bool] = (None, "start", False)
        self._me = Report(rank, os.getpid(), socket.gethostname())

    def at(self, step: int, phase: str, together: bool = False) -> None:
        """Say where the main thread is now. Costs nanoseconds.

        Args:
            step: as the loop counts, from 0; messages count from 1.
            together: the ranks wait for each other here, so that standing still for longer than a collective may take
                is a hang. What a rank does alone may take any time.
        """
        self._place = (step, phase, together)

    @property
    def place(self) -> str:
        """``step 14, backward``."""
        step, phase, together = self._place
        return replace(self._me, step=step, phase=phase, together=together).place


@contextmanager
def watching(folder: Path | None = None, silence_seconds: float = 60.0) -> Iterator[Watch]:
    """Around all that the ranks do together; a lone process is not watched.

    An error that leaves it on one rank ends all of them: with its own line or traceback on that rank, without a word on
    the others. A collective that failed because another rank has gone or hangs is raised as :class:`RanksStopped`.

    Args:
        folder: where the ranks' flight records are written when they hang.
        silence_seconds: how long a process, or its host, may give no sign of life.
    """
    joined = world.joined()
    if joined is None or joined.seat.size == 1:
        yield Watch()
        return
    watch = _SharedWatch(joined, folder, silence_seconds)
    watch.begin()
    try:
        yield watch
    except BaseException as error:
        ending = watch.ending(error)
        if ending is None:
            raise
        raise ending from None
    finally:
        watch.leave()


class _SharedWatch(Watch):
    """One rank's watch over all. Its main thread and its thread each ask the store through a client of their own."""

    def __init__(self, joined: Joined, folder: Path | None, silence_seconds: float):
        super().__init__(joined.seat.rank)
        self._joined, self._seat, self._folder = joined, joined.seat, folder
        self._silence = silence_seconds
        self._limit = world.collective_seconds() + _LATE
        self._store = joined.store()
        self._failure: Failure | None = None
        self._seen_place: object = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._first = self._me  # of rank 0, which takes the store with it when it dies

    def begin(self) -> None:
        """Show the others who this is, and start."""
        self._publish(self._store)
        self._first = _read(self._store, 0)
        self._thread.start()

    def leave(self) -> None:
        """The end, for better or worse. The process that keeps the store stays until the others have read it."""
        self._left.set()
        self._thread.join(2.0)
        with suppress(StoreGone):
            _write(self._store, replace(self._me, beat=self._me.beat + 1, left=True))
            self._store.set(f"seen/{self._me.rank}")
            # After a failure it is enough that the others know: they may not get away while they wait for this process.
            if self._failure:
                awaited = [f"seen/{rank}" for rank in range(self._seat.size) if rank not in self._failure.gone]
            else:
                self._store.set(f"left/{self._me.rank}")
                awaited = [f"left/{rank}" for rank in range(self._seat.size)]
            until = time.monotonic() + (_GRACE if self._failure else 10.0)
            while self._seat.keeps_store and time.monotonic() < until and not self._store.has(*awaited):
                time.sleep(0.02)

    # In the main thread, after an error

    def ending(self, error: BaseException) -> UserError | None:
        """What to raise instead of the error; None for the error itself."""
        if isinstance(error, UserError) and error.told:  # the ranks agreed on it; rank 0 tells
            return None
        try:
            if is_collective_failure(error):
                with _without_sigterm():
                    self._failure = self._cause(error)
            else:
                line = f"rank {self._me.rank} failed in {self.place}: {type(error).__name__}: {error}"
                mine = Failure(self._me.rank, line, exit_code(error))
                self._failure = claim(self._store, mine)
                if self._failure == mine:
                    return None
        except RuntimeError:
            self._failure = self._failure or self._store_gone()
            if not is_collective_failure(error):
                return None
        if self._failure.hangs and self._folder:
            dump_flight(self._folder, self._me.rank)
        return self._failure.error(self._me.rank)

    def _cause(self, error: BaseException) -> Failure:
        """Why a collective failed: what another rank said, or whose signs of life have ended."""
        if is_timeout(error):
            return claim(self._store, self._hang(self._store))
        known = self._failure or claimed(self._store)
        before, until = [] if known else self._reports(self._store), time.monotonic() + _HEARD
        while not known and time.monotonic() < until:
            time.sleep(0.05)
            known = self._failure or claimed(self._store)
        if known:
            return known
        after = self._reports(self._store)
        gone = [old for old, new in zip(before, after, strict=True) if old.beat == new.beat and not new.left]
        if gone:
            return claim(self._store, self._fault(_gone(gone), gone))
        lost = f"{self._me.who} lost its connection to another rank in {self.place}"
        return claim(self._store, self._fault(f"{lost}: {str(error).splitlines()[0]}"))

    def _fault(self, line: str, gone: list[Report] | None = None) -> Failure:
        return Failure(self._me.rank, line, 1, gone=tuple(report.rank for report in gone or ()))

    def _hang(self, store: SharedStore) -> Failure:
        where = f"; torchfrtrace reads the ranks' last collectives in {self._folder}" if self._folder else ""
        return Failure(self._me.rank, behind(self._reports(store)) + where, 1, hangs=True)

    def _store_gone(self) -> Failure:
        """Nobody can agree any more on who tells: the first rank that is left does."""
        if self._seat.agent_keeps_store:
            where = f"{self._seat.host}:{self._seat.port}"
            return Failure(0, f"the launcher's store at {where} is gone, and its host perhaps", 1)
        return Failure(1, _gone([self._first]), 1)

    def _reports(self, store: SharedStore) -> list[Report]:
        keys = [f"progress/{rank}" for rank in range(self._seat.size)]
        if store.has(*keys):
            return [Report(**json.loads(text)) for text in store.get_all(keys)]
        return [_read(store, rank) if store.has(key) else Report(rank, 0, "?") for rank, key in enumerate(keys)]

    # In the thread

    def _watch(self) -> None:
        beats = _Beats(self._seat.size, self._silence)
        failure: Failure | None
        try:
            store = self._joined.store()
            while (failure := self._look(store, beats)) is None:
                if self._left.wait(_TICK):
                    return
            store.set(f"seen/{self._me.rank}")
        except (OSError, RuntimeError):
            failure = self._store_gone()
        self._end(failure)

    def _look(self, store: SharedStore, beats: _Beats) -> Failure | None:
        self._publish(store)
        failure = claimed(store)
        if failure is not None:
            return failure
        self._first = _read(store, 0)
        if self._me.together and self._me.still > self._limit:
            return claim(store, self._hang(store))
        if self._me.rank == 0 and self._me.beat % _LOOK == 0:
            silent = beats.silent(self._reports(store))
            if silent:
                return claim(store, self._fault(_silent(silent, self._silence), silent))
        return None

    def _publish(self, store: SharedStore) -> None:
        step, phase, together = place = self._place
        collectives = collectives_entered()
        moved = place is not self._seen_place or collectives != self._me.collectives
        self._seen_place = place
        self._me = replace(
            self._me,
            beat=self._me.beat + 1,
            step=step,
            phase=phase,
            together=together,
            # Counted in ticks: a suspended machine's clock goes on.
            still=0.0 if moved else self._me.still + _TICK,
            collectives=collectives,
        )
        _write(store, self._me)

    def _end(self, failure: Failure) -> None:
        """The main thread may leave by itself; a collective holds it for longer."""
        self._failure = failure
        if self._left.wait(_GRACE):
            return
        if failure.hangs and self._folder:
            dump_flight(self._folder, self._me.rank)
        if failure.rank == self._me.rank:
            print(f"error: {failure.line}", file=sys.stderr)
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the cursor, which a live display hides
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(failure.exit_code)


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """A launcher that sees one process die ends the others at once: they end anyway, having said why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Beats:
    """When each process was last heard of, in looks of this one: a suspended machine's clock goes on."""

    def __init__(self, size: int, silence_seconds: float):
        self._last = [0] * size
        self._looks = [0] * size
        self._allowed = silence_seconds / (_LOOK * _TICK)

    def silent(self, reports: list[Report]) -> list[Report]:
        for rank, report in enumerate(reports):
            heard = report.beat != self._last[rank] or report.left
            self._looks[rank] = 0 if heard else self._looks[rank] + 1
            self._last[rank] = report.beat
        return [report for report in reports if self._looks[report.rank] >= self._allowed]


def _write(store: SharedStore, report: Report) -> None:
    store.set(f"progress/{report.rank}", json.dumps(asdict(report)))


def _read(store: SharedStore, rank: int) -> Report:
    return Report(**json.loads(store.get(f"progress/{rank}")))


def _gone(reports: list[Report]) -> str:
    is_gone = "is gone: it was" if len(reports) == 1 else "are gone: the first was"
    return (
        f"{_named(reports)} {is_gone} last seen in {reports[0].place}; look at what it printed, and in its host's log "
        "for a process that was killed for want of memory"
    )


def _silent(reports: list[Report], seconds: float) -> str:
    have = "has" if len(reports) == 1 else "have"
    return (
        f"{_named(reports)} {have} given no sign of life for {seconds:g} s, last in {reports[0].place}; see whether "
        "the process is stopped and its host up"
    )


def _named(reports: list[Report]) -> str:
    more = len(reports) - 1
    return reports[0].who + (f" and {more} more rank{'s' if more > 1 else ''}" if more else "")

"""Ctrl-C and a scheduler's SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from genscale.runtime.world import on_any_rank


class Interruption:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self) -> bool:
        """Asked on every rank at the same place, so that all of them stop after the same step."""
        return on_any_rank(self.signal is not None)


@contextmanager
def watched_signals() -> Iterator[Interruption]:
    """Within, a first SIGINT or SIGTERM is noted, to be acted on between steps; a second SIGINT acts at once.

    Schedulers send SIGTERM more than once, and so may launchers: that never keeps a run from saving.

    Python lets only the main thread watch signals; elsewhere (a notebook's worker) nothing is noted.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before: dict[int, object] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        before.clear()

    def note(number: int, frame: FrameType | None) -> None:
        interruption.signal = number
        if number == signal.SIGINT:
            restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield interruption
    finally:
        restore()

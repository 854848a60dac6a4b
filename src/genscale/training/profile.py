"""A torch profiler trace of a few steps, on request: ``training.profile: [first, last]``.

It writes into ``trace/`` of the run directory:
- ``steps-00000010-00000012.json.gz``, a Chrome trace, for https://ui.perfetto.dev or ``chrome://tracing``;
- ``steps-00000010-00000012.txt``, the operators that took the most time.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch.profiler import profile, record_function, supported_activities

from genscale.runs.run import Run
from genscale.runtime.files import write_atomically


class StepProfile:
    """Profiles the steps from ``window[0]`` to ``window[1]``, both included and counted from 0; None: does nothing.

    The loop calls :meth:`begin` and :meth:`end` around each step, and :meth:`close` when it stops, however it stops:
    what was recorded until then is written. A run that resumes within the window profiles what is left of it.
    """

    def __init__(self, run: Run, window: tuple[int, int] | None, rank: int = 0):
        self._folder = run.directory / "trace"
        self._window = window
        self._rank = rank
        self._profile: profile | None = None
        self._mark: record_function | None = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        if self._window is not None and self._profile is None and self._window[0] <= step <= self._window[1]:
            self._first = self._last = step
            self._profile = profile(activities=list(supported_activities()), record_shapes=True)
            self._profile.start()
        if self._profile is not None:
            self._mark = record_function(f"step {step}")
            self._mark.__enter__()

    def end(self, step: int) -> None:
        if self._profile is not None and self._window is not None and self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._last = step
            if step >= self._window[1]:
                self.close()

    def close(self) -> None:
        """Write what was recorded, if anything."""
        if self._profile is None:
            return
        recorded, self._profile, self._window = self._profile, None, None
        recorded.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first:08}-{self._last:08}" + (f"-rank{self._rank}" if self._rank else "")
        write_atomically(self._folder / f"{name}.txt", _operators(recorded))
        _write_trace(recorded, self._folder / f"{name}.json.gz")


def _operators(recorded: profile) -> str:
    """The operators by their own time: on the accelerator where there is one, else on the CPU."""
    averages = recorded.key_averages()
    on_device = any(average.self_device_time_total > 0 for average in averages)
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return averages.table(sort_by=order, row_limit=40, max_name_column_width=60)


def _write_trace(recorded: profile, path: Path) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")  # torch compresses by the ending .gz
    try:
        recorded.export_chrome_trace(str(aside))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

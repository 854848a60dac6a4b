"""Throughput and utilisation between two lines of the log, without what validation and checkpoints take."""

from __future__ import annotations

import time


class Meter:
    """Counts samples and the seconds spent in steps."""

    def __init__(self, seconds_before: float):
        self._before = seconds_before
        self._born = time.perf_counter()
        self._samples = 0
        self._seconds = 0.0
        self._started = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self, samples: int) -> None:
        """A step of so many samples ends."""
        self._samples += samples
        self._seconds += time.perf_counter() - self._started

    @property
    def elapsed(self) -> float:
        """Seconds in training over the lives of all the run's processes."""
        return self._before + time.perf_counter() - self._born

    def samples_per_second(self) -> float:
        """Since the last call; 0 before the first step."""
        rate = self._samples / self._seconds if self._seconds else 0.0
        self._samples, self._seconds = 0, 0.0
        return rate

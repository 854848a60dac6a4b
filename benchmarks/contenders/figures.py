"""What every contender measures of itself."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import numpy as np

STARTED = time.time()


def peak_memory() -> int:
    """Bytes: of the accelerator where one was used, else of the process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Figures:
    """Times each step; prints one JSON line at the end.

    Args:
        items: tokens or images in a step.
    """

    def __init__(self, items: int):
        self._items = items
        self._stamps: list[float] = []
        self._cpu: list[float] = []
        self._losses: list[float] = []

    def step(self, loss: float) -> None:
        """To be called after each finished step."""
        self._stamps.append(time.time())
        self._cpu.append(time.process_time())
        self._losses.append(loss)

    def report(self, warmup: int, **others: float) -> None:
        """Median step after ``warmup`` steps; other figures are printed along."""
        seconds = np.diff(self._stamps)[warmup:]
        processor = np.diff(self._cpu)[warmup:]
        print(
            json.dumps(
                {
                    "per_second": self._items / float(np.median(seconds)),
                    "per_cpu_second": self._items / float(np.median(processor)),
                    "peak_memory_mb": peak_memory() / 2**20,
                    "start_to_first_step_s": self._stamps[0] - float(os.environ.get("BENCHMARK_STARTED", STARTED)),
                    "loss": float(np.mean(self._losses[-10:])),
                    **others,
                }
            )
        )

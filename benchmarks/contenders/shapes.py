"""The models, data and figures that every contender of ``train_text.py`` shares."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STARTED = time.time()


@dataclass(frozen=True)
class Shape:
    """A GPT-2-like model: LayerNorm without biases, learned positions, GELU, tied head."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int


SHAPES = {
    "char-10m": Shape(6, 384, 6, 256, 12, 65),
    "bpe-30m": Shape(8, 512, 8, 256, 12, 8192),
}


def arguments() -> tuple[Shape, Path, str, int, bool]:
    """Shape, folder of ``train.npy``, precision, steps, compile: as the driver passes them."""
    shape, folder, precision, steps, compiled = sys.argv[1:6]
    return SHAPES[shape], Path(folder), precision, int(steps), compiled == "compile"


class Figures:
    """Times each step; prints one JSON line at the end."""

    def __init__(self, shape: Shape):
        self._tokens = shape.batch * shape.context
        self._stamps: list[float] = []
        self._cpu: list[float] = []
        self._losses: list[float] = []

    def step(self, loss: float) -> None:
        """To be called after each finished step."""
        self._stamps.append(time.time())
        self._cpu.append(time.process_time())
        self._losses.append(loss)

    def report(self, warmup: int) -> None:
        """Median step after ``warmup`` steps."""
        seconds = np.diff(self._stamps)[warmup:]
        processor = np.diff(self._cpu)[warmup:]
        print(
            json.dumps(
                {
                    "tokens_per_second": self._tokens / float(np.median(seconds)),
                    "tokens_per_cpu_second": self._tokens / float(np.median(processor)),
                    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "start_to_first_step_s": self._stamps[0] - float(os.environ.get("BENCHMARK_STARTED", STARTED)),
                    "loss": float(np.mean(self._losses[-10:])),
                }
            )
        )


def windows(folder: Path, shape: Shape, seed: int = 0):
    """Endless random windows (batch, context + 1) int64, as nanoGPT draws them."""
    tokens = np.load(folder / "train.npy", mmap_mode="r")
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(tokens) - shape.context - 1, shape.batch)
        yield np.stack([tokens[start : start + shape.context + 1].astype(np.int64) for start in starts])

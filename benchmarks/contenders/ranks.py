"""What every contender of ``parallel.py`` shares: its place among the ranks, its rows of a batch, its figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from figures import Figures
from shapes import SHAPES, Shape, windows

SHAPES |= {
    "gpt-124m": Shape(12, 768, 12, 1024, 32, 50257),
    "gpt-350m": Shape(24, 1024, 16, 1024, 16, 50257),
    "gpt-1.3b": Shape(24, 2048, 16, 1024, 8, 50257),
}
"""Those for a GPU beside the small ones: batch for each GPU."""

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Arguments(NamedTuple):
    """As the driver passes them."""

    shape: Shape
    folder: Path
    precision: str
    steps: int
    how: str
    """What the contender does with the ranks."""
    options: frozenset[str]
    """``compile``, ``profile``."""


def arguments() -> Arguments:
    shape, folder, precision, steps, how, *options = sys.argv[1:]
    return Arguments(SHAPES[shape], Path(folder), precision, int(steps), how, frozenset(options))


def device() -> torch.device:
    """This rank's."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """For the loops that are not genscale's."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def own_windows(folder: Path, shape: Shape) -> Iterator[torch.Tensor]:
    """Endless (batch / ranks, context + 1) int64: this rank's rows of the batches that a lone process would read."""
    for window in windows(folder, shape):
        yield torch.from_numpy(window[RANK::RANKS])


def high_water_mb() -> float:
    """The most memory that this process had: of the GPU where it used one, else resident.

    Not ``ru_maxrss``, which begins with that of the process that started this one.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def report(figures: Figures, steps: int, **others: object) -> None:
    """One JSON line of this rank; the driver puts the ranks' lines together."""
    figures.report(warmup=max(1, steps // 5), peak_memory_mb=high_water_mb(), **others)  # type: ignore[arg-type]

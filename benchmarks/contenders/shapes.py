"""The models and data that every contender of ``train_text.py`` shares."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A GPT-2-like model: LayerNorm without biases, learned positions, GELU, tied head."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch * self.context


SHAPES = {
    "char-10m": Shape(6, 384, 6, 256, 12, 65),
    "bpe-30m": Shape(8, 512, 8, 256, 12, 8192),
}


def arguments() -> tuple[Shape, Path, str, int, bool]:
    """Shape, folder of ``train.npy``, precision, steps, compile: as the driver passes them."""
    shape, folder, precision, steps, compiled = sys.argv[1:6]
    return SHAPES[shape], Path(folder), precision, int(steps), compiled == "compile"


def windows(folder: Path, shape: Shape, seed: int = 0):
    """Endless random windows (batch, context + 1) int64, as nanoGPT draws them."""
    tokens = np.load(folder / "train.npy", mmap_mode="r")
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(tokens) - shape.context - 1, shape.batch)
        yield np.stack([tokens[start : start + shape.context + 1].astype(np.int64) for start in starts])

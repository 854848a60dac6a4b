"""States to save, and stores that have saved some."""

import json
from pathlib import Path

import torch
from torch import Tensor

from genscale.training.checkpoint import CheckpointStore


def content(step: int) -> dict[str, Tensor]:
    """A state that can be told to be that of ``step``, and of no other."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(64, 32, generator=generator),
        "model.bias": torch.full((32,), step, dtype=torch.bfloat16),
        "optimizer.step": torch.tensor(float(step)),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits (nan is equal to itself, 0.0 is not -0.0)."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        == b[name].detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        for name in a
    )


def saved(folder: Path, steps: list[int], **options: int) -> CheckpointStore:
    store = CheckpointStore(folder, **{"keep_last": 10, **options})
    for step in steps:
        store.save(step, content(step), {"samples": step * 64})
    store.wait()
    return store


def flip_a_byte(folder: Path, name: str) -> None:
    chunk = json.loads((folder / "index.json").read_text())[name]["chunks"][0]
    path = folder / chunk["file"]
    data = bytearray(path.read_bytes())
    data[chunk["start"] + chunk["bytes"] - 1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])

"""The micro-batch is as asked, or the most that is useful and fits."""

from __future__ import annotations

import pytest
import torch

from genscale.runtime.errors import UserError
from genscale.runtime.world import World
from genscale.training import micro_batch as module
from genscale.training.micro_batch import choose_micro_batch

BYTES = 1_000_000


class Counted(torch.nn.Linear):
    """An objective as far as memory goes: 256 rows and a million bytes a sample."""

    flops = 1e10

    def flops_per_sample(self) -> float:
        return self.flops

    def rows_per_sample(self) -> int:
        return 256

    def activation_bytes_per_sample(self, element: int) -> int:
        return BYTES * element // 4


def choose(requested: object, batch: int, ranks: int = 1) -> int:
    return choose_micro_batch(requested, batch, Counted(8, 8), "fp32", torch.device("cpu"), World(0, ranks))


def test_auto_splits_a_large_batch_evenly() -> None:
    assert choose("auto", 16) == 16
    assert choose("auto", 100) == 50  # at most 64 samples of 256 rows at once: two equal passes
    assert choose("auto", 100, ranks=2) == 50


def test_small_networks_take_more_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "flops", 1e9)
    assert choose("auto", 100) == 100
    assert choose("auto", 120) == 60  # at most 100 GFLOP at once, whatever the rows: two equal passes


def test_auto_respects_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_free", lambda device: 2 * 5 * BYTES + 16 * 72)
    assert choose("auto", 16) == 4  # 5 fit: four passes of 4
    monkeypatch.setattr(module, "memory_free", lambda device: 0)
    assert choose("auto", 16) == 1


def test_more_than_a_share_is_refused() -> None:
    assert choose(8, 16, ranks=2) == 8
    with pytest.raises(
        UserError, match=r"layout\.micro_batch: 16 samples are more than each rank's share of the batch, 8"
    ):
        choose(16, 16, ranks=2)
    with pytest.raises(UserError, match="2 samples are fewer than the 3 ranks"):
        choose("auto", 2, ranks=3)

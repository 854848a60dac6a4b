from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genscale.data.batch import TextBatch
from genscale.data.stream import Stream
from genscale.evaluation import held_out as module
from genscale.evaluation.held_out import bits_per_byte, held_out
from genscale.objectives.objective import Loss, Objective
from genscale.runtime.randomness import Rng
from genscale.runtime.world import World

CPU = torch.device("cpu")


class Noisy(Objective):
    """Each target token costs its own number plus noise; half of them, by noise, count for ``half``."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"model": nn.Dropout(0.5)})
        self.passes: list[int] = []

    def validate(self, batch: TextBatch, rng: Rng) -> Loss:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        self.passes.append(len(batch))
        valid = torch.ones_like(batch.tokens[:, 1:]) if batch.valid is None else batch.valid
        noise = rng.uniform("noise", tuple(valid.shape[1:]))
        cost = (batch.tokens[:, 1:] + noise) * valid
        picked = (noise < 0.5) * valid
        metrics: dict[str, tuple[Tensor, Tensor]] = {
            "loss": (cost.sum(), valid.sum()),
            "half": ((cost * picked).sum(), picked.sum()),
        }
        return Loss(cost.sum(), metrics)


def stream(tokens: int = 1000, context: int = 16) -> Stream:
    store: Any = SimpleNamespace(
        path="stores/x",
        tokens=lambda split: tokens,
        shards=lambda split: [np.arange(tokens, dtype=np.uint16)],
        document_starts=lambda split: np.array([0]),
        tokenizer=SimpleNamespace(fingerprint="a", end_of_document=None),
    )
    return Stream([store], None, "validation", context, 0)


def test_is_the_mean_over_every_token_but_the_first() -> None:
    scores = held_out(Noisy(), stream(), seed=3, batch=7, device=CPU)
    assert set(scores) == {"loss", "half"}
    assert scores["loss"] == pytest.approx(np.arange(1, 1000).mean() + 0.5, abs=0.05)


@pytest.mark.parametrize("batch", [1, 2, 63, 200])
def test_does_not_depend_on_the_batch_size(batch: int) -> None:
    expected = held_out(Noisy(), stream(), seed=3, batch=7, device=CPU)
    assert held_out(Noisy(), stream(), seed=3, batch=batch, device=CPU) == pytest.approx(expected, rel=1e-6)


def test_noise_follows_the_seed() -> None:
    first, same, other = (held_out(Noisy(), stream(), seed=seed, batch=7, device=CPU) for seed in (3, 3, 4))
    assert first == same
    assert first["half"] != other["half"]


def test_limit_scores_that_many_windows() -> None:
    objective = Noisy()
    held_out(objective, stream(), seed=0, batch=4, limit=10, device=CPU)
    assert objective.passes == [4, 4, 2]


@pytest.mark.parametrize("ranks", [2, 3, 100])
def test_ranks_share_the_work_and_agree(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[Tensor]] = []
    monkeypatch.setattr(module, "all_reduce_sum", lambda tensors, world: parts.append([t.clone() for t in tensors]))
    passes = []
    for rank in range(ranks):
        objective = Noisy()
        held_out(objective, stream(), seed=3, batch=5, device=CPU, world=World(rank, ranks))
        passes.append(len(objective.passes))
    monkeypatch.undo()
    assert len(set(passes)) == 1, "collectives inside the network need every rank to run it as often"
    together = [sum(column[1:], column[0]) for column in zip(*parts, strict=True)]
    scores = [(total / count).item() for total, count in together]
    expected = held_out(Noisy(), stream(), seed=3, batch=5, device=CPU)
    assert scores == pytest.approx(list(expected.values()), rel=1e-6)


def test_leaves_the_objective_as_it_was() -> None:
    objective = Noisy()
    for mode in (True, False):
        objective.train(mode)
        held_out(objective, stream(), seed=0, batch=8, device=CPU)
        assert objective.networks["model"].training is mode


def test_bits_per_byte() -> None:
    # Uniform over 256 values, one token a byte: 8 bits; the same loss on half as many tokens: 4 bits.
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 500, 1000) == pytest.approx(4)

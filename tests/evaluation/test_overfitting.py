from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from genscale.data.image_batch import ImageBatch
from genscale.evaluation.overfitting import denoising_gap
from genscale.objectives.objective import Loss, Objective
from genscale.runtime.randomness import Rng

CPU = torch.device("cpu")


class Times(Objective):
    """The loss of an image is its brightness plus a time that its number draws, many times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()

    def validate(self, batch: ImageBatch, rng: Rng) -> Loss:
        total = (batch.images.mean((1, 2, 3)) + 100 * rng.uniform("time")).sum()
        return Loss(total, {"loss": (total, torch.tensor(float(len(batch))))})


class Split:
    """Images of one brightness, numbered as in a split of another size."""

    def __init__(self, brightness: float, first: int):
        self.brightness = brightness
        self.first = first

    def sweep(self, batch: int, limit: int | None) -> Iterator[ImageBatch]:
        assert limit is not None
        numbers = 3 * torch.arange(self.first, self.first + limit)
        for part in numbers.split(batch):
            yield ImageBatch(torch.full((len(part), 1, 2, 2), self.brightness), None, None, part)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_both_splits_meet_the_same_times(batch: int) -> None:
    found = denoising_gap(Times(), Split(0.25, 0), Split(0.5, 1000), samples=30, seed=7, batch=batch, device=CPU)
    assert set(found) == {"training_loss", "validation_loss", "gap"}
    assert found["gap"] == pytest.approx(0.25, abs=1e-4), "times differ by tens where they are drawn anew"
    assert found["validation_loss"] - found["training_loss"] == found["gap"]
    assert 20 < found["training_loss"] < 80

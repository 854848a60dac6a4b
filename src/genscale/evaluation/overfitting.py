"""Overfitting of a denoiser: its loss on training images beside that on held-out ones, at the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from genscale.evaluation.held_out import Sweep, held_out
from genscale.objectives.objective import Objective
from genscale.runtime.world import World


def denoising_gap(
    objective: Objective,
    training: Sweep,
    validation: Sweep,
    *,
    samples: int,
    seed: int,
    batch: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    world: World | None = None,
) -> dict[str, float]:
    """The objective's held-out loss on as many training samples as validation samples.

    The n-th sample of either split meets the same times and the same noise, which vary far more than images do; so the
    gap is the images' own.

    Args:
        training: sweeps over the training split.
        validation: over the validation split.
        samples: of each, spread over its split; not more than either has.

    Returns:
        ``training_loss``, ``validation_loss``, and ``gap``, the second minus the first: about 0 where the network has
        learned the distribution, above it where it knows its training images.
    """
    losses = [
        held_out(
            objective,
            _Numbered(split),
            seed=seed,
            batch=batch,
            limit=samples,
            device=device,
            autocast=autocast,
            world=world,
        )["loss"]
        for split in (training, validation)
    ]
    return {"training_loss": losses[0], "validation_loss": losses[1], "gap": losses[1] - losses[0]}


class _Numbered:
    """A sweep whose samples are numbered 0, 1, 2, ..., whatever their numbers in the split; these key their noise."""

    def __init__(self, stream: Sweep):
        self.stream = stream

    def sweep(self, batch: int, limit: int | None) -> Iterator[Any]:
        first = 0
        for samples in self.stream.sweep(batch, limit):
            yield dataclasses.replace(samples, positions=torch.arange(first, first + len(samples)))
            first += len(samples)

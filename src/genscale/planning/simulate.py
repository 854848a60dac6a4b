"""What one process of a large layout would hold, found by laying the model out without data on simulated ranks.

Nothing is estimated: the networks are built and split by the code that trains, on a process group that only pretends
(torch's ``fake`` backend), and what comes to lie on the rank is counted.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from genscale.data.description import Description, ImageDescription, TextDescription
from genscale.objectives.build import build_objective
from genscale.parallel.fit import fitted_sizes
from genscale.parallel.mesh import Mesh
from genscale.parallel.parallelize import parallelize, without_data
from genscale.parallel.shards import local
from genscale.recipe.data import TextData
from genscale.recipe.layout import Axis
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Adafactor, AdamW, Muon, Optimizer, ScheduleFree
from genscale.runtime.errors import UserError
from genscale.runtime.world import current_world

_ELEMENT = 4
"""Bytes: weights, gradients and optimizer state are float32."""


@dataclass(frozen=True)
class Held:
    """What one rank of a layout holds, in bytes."""

    rank: int
    ranks: int
    layout: dict[Axis, int]
    parameters: int
    """Numbers, of the whole model."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    seconds: float
    """That laying out took."""

    @property
    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate(recipe: Recipe, ranks: int, rank: int = 0) -> Held:
    """Lay the recipe's model out on ``ranks`` pretended processes and count what this one, ``rank``, holds.

    Raises:
        UserError: the layout does not fit, or this process is in a process group already.
    """
    if current_world().size > 1:
        raise UserError("a simulation is one process; start it without torchrun")
    sizes = fitted_sizes(recipe, ranks)
    if not 0 <= rank < ranks:
        raise UserError(f"rank: expected 0 to {ranks - 1}, not {rank}")
    begun = time.perf_counter()
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = Mesh(sizes, torch.device("cpu"))
        with without_data():
            objective = build_objective(recipe, _described(recipe))
        total = sum(parameter.numel() for parameter in objective.networks.parameters())
        placed = parallelize(objective, recipe.layout, mesh, torch.device("cpu"), real=False)
        elements, states = 0, 0
        for each in placed.values():
            for name, parameter in each.network.named_parameters():
                count = local(parameter).numel()
                elements += count
                stacked = any(part.isdigit() for part in name.split(".")) and parameter.ndim > 1
                states += count * _states(recipe.training.optimizer, stacked)
    finally:
        distributed.destroy_process_group()
    return Held(
        rank=rank,
        ranks=ranks,
        layout={axis: size for axis, size in sizes.items() if size > 1},
        parameters=total,
        parameter_bytes=elements * _ELEMENT,
        gradient_bytes=elements * _ELEMENT,
        optimizer_bytes=states * _ELEMENT,
        seconds=time.perf_counter() - begun,
    )


def _states(optimizer: Optimizer, in_blocks: bool) -> int:
    """Numbers that the optimizer keeps for each number of a parameter, factors and counters aside."""
    if isinstance(optimizer, Muon):
        return 1 if in_blocks else 2
    if isinstance(optimizer, AdamW | ScheduleFree):
        return 2
    assert isinstance(optimizer, Adafactor)
    return 0


def _described(recipe: Recipe) -> Description:
    """The data as the recipe says it will be."""
    if isinstance(recipe.data, TextData):
        vocabulary = getattr(recipe.data.tokenizer, "vocabulary", None)
        if vocabulary is None:
            raise UserError("data.tokenizer: a simulation needs the vocabulary's size, which this tokenizer's file has")
        return TextDescription(vocabulary)
    return ImageDescription(channels=recipe.data.channels, resolution=recipe.data.resolution)

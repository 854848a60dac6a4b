"""Samples of a model that no process has whole: the first one puts a copy together and draws with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from genscale.data.description import Description
from genscale.objectives.build import build_objective
from genscale.objectives.objective import Objective
from genscale.parallel.shards import whole
from genscale.recipe.schema import Recipe
from genscale.runtime.device import memory_free
from genscale.runtime.world import World, from_rank_0
from genscale.training.state import TrainingState

Samples = list[dict[str, str | bytes]]

_SHARE_OF_MEMORY = 0.5
"""Of the CPU's free memory that the copy may take; a model that is larger is drawn with after training."""


class WholeCopy:
    """The networks, whole, on the CPU of rank 0.

    Args:
        objective: with all the networks' names, before they are laid on the ranks.
    """

    def __init__(self, recipe: Recipe, described: Description, objective: Objective, world: World):
        self.world = world
        self.names = {network: list(module.state_dict()) for network, module in objective.networks.items()}
        bytes_needed = sum(4 * p.numel() for p in objective.networks.parameters())
        self.fits = from_rank_0(lambda: bytes_needed < _SHARE_OF_MEMORY * memory_free(torch.device("cpu")))
        self._build = lambda: build_objective(recipe, described)
        self._objective: Objective | None = None
        self._holders: dict[str, int] = {}

    @torch.no_grad()
    def preview(self, state: TrainingState, draw: Callable[[Objective], Samples]) -> Samples:
        """Samples, on rank 0; all ranks call it. None where the copy does not fit."""
        if not self.fits:
            return []
        here: dict[str, Any] = {
            f"{network}.{name}": tensor
            for network, module in state.networks.items()
            for name, tensor in module.state_dict().items()
        }
        if not self._holders:
            self._holders = self._first_holders(list(here))
        leads = self.world.rank == 0
        if leads and self._objective is None:
            self._objective = self._build()
        targets = {} if self._objective is None else self._objective.networks.state_dict()
        for network, names in self.names.items():
            for name in names:
                key = f"{network}.{name}"
                full = whole(here[key]) if key in here else None
                holder = self._holders[key]
                if holder != 0 and self.world.rank == holder:
                    assert full is not None
                    distributed.send(full.cpu().contiguous(), dst=0)
                elif holder != 0 and leads:
                    full = torch.empty_like(targets[key], device="cpu")
                    distributed.recv(full, src=holder)
                if leads and full is not None:
                    targets[key].copy_(full)
        return draw(self._objective) if self._objective is not None else []

    @staticmethod
    def _first_holders(names: list[str]) -> dict[str, int]:
        """Of each tensor, the first rank that has it or a part of it."""
        of_ranks: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(of_ranks, names)
        holders: dict[str, int] = {}
        for rank, held in enumerate(of_ranks):
            for name in held:
                holders.setdefault(name, rank)
        return holders

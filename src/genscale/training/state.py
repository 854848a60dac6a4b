"""All that training changes, as flat named tensors: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from genscale.objectives.objective import Objective
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.training.average import WeightAverage
from genscale.training.optimizers import (
    build_optimizer,
    evaluation_weights,
    load_optimizer_state,
    optimizer_state,
)
from genscale.training.precision import GradientScaler


class TrainingState:
    """Networks with, for each, its optimizer and, where the recipe asks, its average; and the gradient scaler."""

    def __init__(self, objective: Objective, recipe: Recipe, half_life: int | None, precision: str):
        self.objective = objective
        self.networks = dict(objective.networks.items())
        self.optimizers = {
            name: build_optimizer(network, recipe.training.optimizer) for name, network in self.networks.items()
        }
        self.averages = (
            {name: WeightAverage(network, half_life) for name, network in self.networks.items()} if half_life else {}
        )
        self.scaler = GradientScaler(precision)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that no layout changes."""
        flat: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            flat |= _prefixed(f"networks.{name}.", network.state_dict())
            flat |= _prefixed(f"optimizers.{name}.", optimizer_state(self.optimizers[name], network))
        for name, average in self.averages.items():
            flat |= _prefixed(f"averages.{name}.", average.state)
        return flat | _prefixed("scaler.", self.scaler.state())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave; raises UserError when the tensors are another network's."""
        for name, network in self.networks.items():
            load_network(network, _under(tensors, f"networks.{name}."))
            load_optimizer_state(self.optimizers[name], network, _under(tensors, f"optimizers.{name}."))
        for name, average in self.averages.items():
            average.load(_under(tensors, f"averages.{name}."))
        self.scaler.load(_under(tensors, "scaler."))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, the networks hold the weights to be judged: the averages, or what the optimizer says."""
        with ExitStack() as stack:
            for name, optimizer in self.optimizers.items():
                stack.enter_context(evaluation_weights(optimizer))
                if name in self.averages:
                    stack.enter_context(self.averages[name].swapped())
            yield


def load_network(network: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly load a network's weights; raises UserError on the first name or shape that does not fit."""
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"the checkpoint has no weight '{name}': it was made by another model")
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"the checkpoint's weight '{name}' has shape {found}, but the model has {expected}")
    network.load_state_dict({name: tensors[name] for name in own})


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

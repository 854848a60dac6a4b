"""All that training changes, as flat named tensors: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from genscale.objectives.objective import Objective
from genscale.parallel.parallelize import Placed
from genscale.parallel.shards import alike, leaves, local
from genscale.recipe.schema import Recipe
from genscale.recipe.training import PowerAverage as PowerRecipe
from genscale.runtime.errors import UserError
from genscale.training.average import WeightAverage
from genscale.training.checkpoint import Saved
from genscale.training.optimizers import (
    build_optimizer,
    evaluation_weights,
    load_optimizer_state,
    optimizer_state,
)
from genscale.training.power_average import PowerAverage
from genscale.training.precision import GradientScaler


class TrainingState:
    """Networks with their optimizers, averages of those that are sampled where the recipe asks, the gradient scaler.

    Args:
        placed: how the networks lie on the ranks; by default each is whole here.
    """

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        half_life: int | None,
        precision: str,
        placed: dict[str, Placed] | None = None,
    ):
        self.objective = objective
        self.networks = dict(objective.networks.items())
        self.placed = placed or {}
        self.parts = {name: leaves(network) for name, network in self.networks.items()}
        self.optimizers = {
            name: build_optimizer(network, recipe.training.optimizer, self.parts[name])
            for name, network in self.networks.items()
        }
        average = recipe.training.average
        self.averages: dict[str, WeightAverage | PowerAverage] = {}
        for name in objective.sampled if average else ():
            network = self.networks[name]
            if isinstance(average, PowerRecipe):
                self.averages[name] = PowerAverage(network, average.lengths)
            else:
                assert half_life is not None
                self.averages[name] = WeightAverage(network, half_life)
        self.scaler = GradientScaler(precision)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of which this rank has a part, live, by a name that no layout changes."""
        flat: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            flat |= _prefixed(f"networks.{name}.", network.state_dict())
            flat |= _prefixed(f"optimizers.{name}.", optimizer_state(self.optimizers[name], network, self.parts[name]))
        for name, average in self.averages.items():
            flat |= _prefixed(f"averages.{name}.", average.state)
        flat |= _prefixed("controls.", controls(self.objective))
        return flat | _prefixed("scaler.", self.scaler.state())

    def saved_tensors(self) -> dict[str, Tensor]:
        """Those of :meth:`tensors` that this rank writes to a checkpoint: all but what another stage writes."""
        elsewhere = tuple(
            f"{kind}.{name}.{parameter}"
            for name, placed in self.placed.items()
            for parameter in placed.elsewhere
            for kind in ("networks", "optimizers", "averages")
        )
        return {
            name: tensor for name, tensor in self.tensors().items() if not (elsewhere and name.startswith(elsewhere))
        }

    def room_for(self, saved: Saved) -> dict[str, Tensor]:
        """Tensors to load a checkpoint into, each as its parameter lies on the ranks."""
        live = self.tensors()
        room = {name: tensor for name, tensor in live.items() if name in saved}
        for name, network in self.networks.items():
            prefix = f"optimizers.{name}."
            parameters = dict(network.named_parameters())
            for key in saved:
                if not key.startswith(prefix) or key in room:
                    continue
                dtype, shape = saved[key]
                owner = parameters.get(key.removeprefix(prefix).rpartition(".")[0])
                if owner is not None and owner.shape == shape:
                    room[key] = alike(owner, torch.empty_like(local(owner), dtype=dtype))
                elif owner is not None or key.startswith(f"{prefix}groups."):
                    room[key] = torch.empty(shape, dtype=dtype)
        return room

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave; raises UserError when the tensors are another network's."""
        for name, network in self.networks.items():
            load_network(network, under(tensors, f"networks.{name}."))
            states = under(tensors, f"optimizers.{name}.")
            load_optimizer_state(self.optimizers[name], network, states, self.parts[name])
        for name, average in self.averages.items():
            average.load(under(tensors, f"averages.{name}."))
        load_controls(self.objective, tensors)
        self.scaler.load(under(tensors, "scaler."))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, the networks hold the weights to be judged: the averages, or what the optimizer says."""
        with ExitStack() as stack:
            for name, optimizer in self.optimizers.items():
                stack.enter_context(evaluation_weights(optimizer))
                if name in self.averages:
                    stack.enter_context(self.averages[name].swapped())
            yield


def controls(objective: Objective) -> dict[str, Tensor]:
    """The objective's own persistent buffers, outside its networks; live."""
    return {name: value for name, value in objective.state_dict().items() if not name.startswith("networks.")}


def load_controls(objective: Objective, tensors: dict[str, Tensor]) -> None:
    """Take over the controls among a checkpoint's tensors."""
    for name, control in controls(objective).items():
        control.copy_(tensors[f"controls.{name}"])


def load_network(network: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strictly load a network's weights; raises UserError on the first name or shape that does not fit."""
    own = network.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"the checkpoint has no weight '{name}': it was made by another model")
        if tensors[name].shape != tensor.shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"the checkpoint's weight '{name}' has shape {found}, but the model has {expected}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensors[name] is not tensor:
                local(tensor).copy_(local(tensors[name]))


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of the tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""All that training changes, as flat named tensors: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from genscale.objectives.objective import Objective
from genscale.parallel.mesh import Mesh
from genscale.parallel.parallelize import Placed
from genscale.parallel.shards import alike, leaves, local
from genscale.recipe.schema import Recipe
from genscale.recipe.training import PowerAverage as PowerRecipe
from genscale.runtime.errors import UserError
from genscale.training.average import WeightAverage
from genscale.training.checkpoint import Saved
from genscale.training.low_communication import OuterOptimizer, by_group
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
        mesh: the ranks.
    """

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        half_life: int | None,
        precision: str,
        placed: dict[str, Placed] | None = None,
        mesh: Mesh | None = None,
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
        self.mesh = mesh or Mesh.lone()
        apart = recipe.training.low_communication
        self.outer: dict[str, OuterOptimizer] = {}
        for name, network in self.networks.items() if apart else ():
            assert apart is not None
            parameters: dict[str, Tensor] = dict(network.named_parameters())
            self.outer[name] = OuterOptimizer(parameters, apart, self.mesh.group("group"))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of which this rank has a part, live, by a name that no layout changes."""
        flat: dict[str, Tensor] = {}
        for name, network in self.networks.items():
            weights = network.state_dict()
            states = optimizer_state(self.optimizers[name], network, self.parts[name])
            if name in self.outer:  # what groups share stands where weights always stand
                own = {key: weights[key] for key in self.outer[name].shared}
                flat |= self._of_groups(_prefixed(f"networks.{name}.", own) | _prefixed(f"optimizers.{name}.", states))
                weights |= self.outer[name].shared
                outer = self.outer[name].tensors()
                flat |= _prefixed(f"outer.{name}.", {k: v for k, v in outer.items() if not k.startswith("shared.")})
            else:
                flat |= _prefixed(f"optimizers.{name}.", states)
            flat |= _prefixed(f"networks.{name}.", weights)
        for name, average in self.averages.items():
            flat |= _prefixed(f"averages.{name}.", average.state)
        for name, placed in self.placed.items():
            flat |= _prefixed(f"compression.{name}.", placed.gradients.compressor.state())
        flat |= _prefixed("controls.", controls(self.objective))
        return flat | _prefixed("scaler.", self.scaler.state())

    def _of_groups(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What groups that train apart have each for itself."""
        if self.mesh.size("group") == 1:
            return _prefixed("groups.", {name: tensor[None] for name, tensor in tensors.items()})
        return _prefixed("groups.", by_group(tensors, self.mesh.devices, "group"))

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
            apart = "groups." if name in self.outer else ""
            prefix = f"{apart}optimizers.{name}."
            parameters = dict(network.named_parameters())
            states: dict[str, Tensor] = {}
            for key in saved:
                if not key.startswith(prefix):
                    continue
                dtype, shape = saved[key]
                shape = shape[1:] if apart else shape
                owner = parameters.get(key.removeprefix(prefix).rpartition(".")[0])
                if owner is not None and owner.shape == shape:
                    states[key.removeprefix(apart)] = alike(owner, torch.empty_like(local(owner), dtype=dtype))
                elif owner is not None or key.startswith(f"{prefix}groups."):
                    states[key.removeprefix(apart)] = torch.empty(shape, dtype=dtype)
            room |= self._of_groups(states) if apart else states
            remembered = [key for key in saved if key.startswith(f"compression.{name}.")]
            room |= {key: torch.empty(saved[key][1], dtype=saved[key][0]) for key in remembered}
        return room

    def load(self, tensors: dict[str, Tensor], step: int = 0) -> None:
        """Take over what :meth:`tensors` gave after ``step`` steps; raises UserError when the tensors are another
        network's."""
        for name, network in self.networks.items():
            weights, states = under(tensors, f"networks.{name}."), under(tensors, f"optimizers.{name}.")
            if name in self.outer:
                shared = {key: weights[key] for key in self.outer[name].shared}
                self.outer[name].load(_prefixed("shared.", shared) | under(tensors, f"outer.{name}."), step)
                parameters = dict(network.named_parameters())
                own = under(tensors, f"groups.networks.{name}.")
                weights |= {key: alike(parameters[key], local(tensor)[0]) for key, tensor in own.items()}
                states = {key: local(t)[0] for key, t in under(tensors, f"groups.optimizers.{name}.").items()}
            load_network(network, weights)
            load_optimizer_state(self.optimizers[name], network, states, self.parts[name])
            if name in self.placed:
                self.placed[name].gradients.compressor.load(under(tensors, f"compression.{name}."))
        for name, average in self.averages.items():
            average.load(under(tensors, f"averages.{name}."))
        load_controls(self.objective, tensors)
        self.scaler.load(under(tensors, "scaler."))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, the networks hold the weights to be judged: the averages, or what the optimizer says, or the groups
        share."""
        with ExitStack() as stack:
            for outer in self.outer.values():
                stack.enter_context(outer.shared_weights())
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

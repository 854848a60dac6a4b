"""From the recipe's optimizer to one that updates a network, and its state as named tensors for the checkpoint.

A network's parameters fall into three groups (:func:`parameter_roles`):

- ``matrices``: of layers inside a numbered stack (``blocks.3.attention...``). They alone get weight decay, and Muon;
- ``ends``: matrices at the network's two ends, that is embeddings, the head, projections of patches. No decay: rows of
  rare tokens, which see hardly any gradient, would only shrink;
- ``vectors``: biases and the scales of norms. No decay.

What is updated are leaves (:func:`genscale.parallel.shards.leaves`): of a parameter that is split over ranks this
rank's part, a plain tensor; so every optimizer that works element by element serves every layout as it is.

Each group of ``optimizer.param_groups`` carries ``name`` and ``base_learning_rate``. The loop sets ``group["lr"]``, a
float, to the base times the schedule's factor before each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from genscale.models.mixture import Experts
from genscale.parallel.shards import alike, leaves, local
from genscale.recipe import training as recipes
from genscale.runtime.errors import UserError
from genscale.training import eight_bit
from genscale.training.muon import Form, Muon, multiplying_bits
from genscale.training.schedule_free import ScheduleFreeAdamW


def build_optimizer(
    network: nn.Module, recipe: recipes.Optimizer, parts: dict[str, Tensor] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the network's trainable parameters.

    Args:
        parts: the network's leaves, by parameter, where they are not to be found anew.

    Raises:
        UserError: when a library that it needs is missing, or Muon finds no matrices.
    """
    parts = leaves(network) if parts is None else parts
    if isinstance(recipe, recipes.Muon):
        return _muon(network, recipe, parts)
    groups = _groups(network, parts, recipe.learning_rate, {"matrices": recipe.weight_decay})
    if isinstance(recipe, recipes.AdamW):
        return _adamw(groups, recipe)
    if isinstance(recipe, recipes.Adafactor):
        return torch.optim.Adafactor(groups, beta2_decay=recipe.beta2_decay, d=recipe.clip)
    return ScheduleFreeAdamW(groups, betas=(float(recipe.beta1), float(recipe.beta2)), epsilon=recipe.epsilon)


def parameter_roles(network: nn.Module) -> dict[str, str]:
    """Each trainable parameter's group by its name: ``matrices``, ``ends`` or ``vectors``."""
    embeddings = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    roles = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        stacked = any(part.isdigit() for part in name.split("."))
        if parameter.ndim < 2:
            roles[name] = "vectors"
        else:
            roles[name] = "matrices" if stacked and id(parameter) not in embeddings else "ends"
    return roles


def _groups(
    network: nn.Module,
    parts: dict[str, Tensor],
    learning_rate: float,
    weight_decay: dict[str, float],
    names: tuple[str, ...] = ("matrices", "ends", "vectors"),
) -> list[dict[str, Any]]:
    """Parameter groups with those names, leaving out empty ones; a group not in ``weight_decay`` has none."""
    roles = parameter_roles(network)
    groups: list[dict[str, Any]] = []
    for name in names:
        parameters = [parts[key] for key, role in roles.items() if role == name]
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "name": name,
                    "lr": learning_rate,
                    "base_learning_rate": learning_rate,
                    "weight_decay": weight_decay.get(name, 0.0),
                }
            )
    return groups


def _adamw(groups: list[dict[str, Any]], recipe: recipes.AdamW) -> torch.optim.Optimizer:
    betas = (float(recipe.beta1), float(recipe.beta2))
    if recipe.bits == 8:
        return eight_bit.adamw(groups, betas, recipe.epsilon)
    return torch.optim.AdamW(groups, betas=betas, eps=recipe.epsilon, fused=True)


def _muon(network: nn.Module, recipe: recipes.Muon, parts: dict[str, Tensor]) -> torch.optim.Optimizer:
    matrices = _groups(network, parts, recipe.learning_rate, {"matrices": recipe.weight_decay}, ("matrices",))
    if not matrices:
        raise UserError("training.optimizer: muon found no matrices inside numbered blocks of the network; use adamw")
    forms: dict[Tensor, Form] = {}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            name = names.get(id(parameter))
            if name in parts:
                rows = tuple(getattr(module, "output_pieces", ())) if isinstance(module, nn.Linear) else ()
                split = parameter if isinstance(parameter, DTensor) else None
                forms[parts[name]] = Form(rows, isinstance(module, Experts), split)
    muon = Muon(
        matrices,
        momentum=recipe.momentum,
        newton_schulz_steps=recipe.newton_schulz_steps,
        bits=multiplying_bits(matrices[0]["params"][0].device),
        forms=forms,
    )
    ends = {"ends": recipe.rest.weight_decay}
    rest = _groups(network, parts, recipe.rest.learning_rate, ends, ("ends", "vectors"))
    return CombinedOptimizer(muon, _adamw(rest, recipe.rest)) if rest else muon


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers over different parameters of one network, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers
        for optimizer in optimizers:
            optimizer.state = self.state  # one dictionary: no parameter has two optimizers

    def step(self) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the network holds the weights that the optimizer means to be judged; after, exactly those of before.

    They differ from the trained ones for schedule-free only.
    """
    if isinstance(optimizer, ScheduleFreeAdamW):
        with optimizer.averaged():
            yield
    else:
        yield


def optimizer_state(
    optimizer: torch.optim.Optimizer, network: nn.Module, parts: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The whole state, live and flat: ``<parameter>.<state>``, and ``groups.<group>.<scalar>``.

    What is kept for each element of a parameter is split over ranks as the parameter is.

    An 8-bit state is several tensors: ``<parameter>.exp_avg.codes`` and so on.
    """
    flat: dict[str, Tensor] = {}
    parts = leaves(network) if parts is None else parts
    parameters = dict(network.named_parameters())
    for name, leaf in parts.items():
        for key, value in optimizer.state.get(leaf, {}).items():
            if eight_bit.is_quantised(value):
                flat |= {f"{name}.{key}.{part}": tensor for part, tensor in eight_bit.parts(value).items()}
            elif value.shape == leaf.shape:
                flat[f"{name}.{key}"] = alike(parameters[name], value)
            else:
                flat[f"{name}.{key}"] = value
    for group in optimizer.param_groups:
        for key in group.get("kept_scalars", ()):
            flat[f"groups.{group['name']}.{key}"] = torch.tensor(group[key], dtype=torch.float64)
    return flat


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    network: nn.Module,
    tensors: dict[str, Tensor],
    parts: dict[str, Tensor] | None = None,
) -> None:
    """Take over what :func:`optimizer_state` gave, in place of any state; copies, on the parameters' devices.

    Raises:
        UserError: when a tensor belongs to no parameter or group, so to another network or optimizer.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    remaining = dict(tensors)
    optimizer.state.clear()
    for name, parameter in (leaves(network) if parts is None else parts).items():
        keys = [key for key in remaining if key.startswith(f"{name}.")] if parameter in groups else []
        state: dict[str, Any] = {}
        for key in keys:
            tensor = local(remaining.pop(key))
            # Step counters live beside their parameter for fused kernels, and on the CPU for the others.
            on_cpu = tensor.ndim == 0 and not groups[parameter].get("fused")
            state[key.removeprefix(f"{name}.")] = tensor.to("cpu" if on_cpu else parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = eight_bit.assembled(state, parameter.dtype)
    for group in optimizer.param_groups:
        for key in group.get("kept_scalars", ()):
            full = f"groups.{group['name']}.{key}"
            if full not in remaining:
                raise UserError(f"the checkpoint has no optimizer state '{full}': it was made by another optimizer")
            group[key] = type(group[key])(remaining.pop(full).item())
    if remaining:
        raise UserError(
            f"the checkpoint's optimizer state '{min(remaining)}' fits nothing here: "
            "it was made by another model or optimizer"
        )

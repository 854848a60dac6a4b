"""Initial weights: each a pure function of the seed and the parameter's name.

A network states its own rule, by one method:

    def initial_std(self, name: str, size: torch.Size) -> float: ...

It gives the standard deviation that the parameter ``name`` (as in ``self.named_parameters()``) is drawn with, normal
around 0; 0 makes it zero. Any module may have the method: it speaks for all that is inside it, unless a module further
in has one as well. So an encoder within a network begins as it would by itself, and a layer that must begin at zero
says so once. :func:`fan_in_std` is the usual answer. Norms are nobody's business: they begin as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from genscale.models.layers import Norm
from genscale.runtime.randomness import generator


@runtime_checkable
class StatesItsRule(Protocol):
    """A module that says how the parameters inside it begin."""

    def initial_std(self, name: str, size: torch.Size) -> float: ...


@dataclass(frozen=True)
class Beginning:
    """What a network's first values are a function of, besides their names: kept with it as ``beginning``."""

    seed: int
    prefix: str


def initialise(network: nn.Module, seed: int, prefix: str = "model") -> None:
    """Give every parameter of ``network`` its initial value.

    A value depends on the seed and the parameter's full name alone, and so neither on the other layers nor on the
    machine. Parameters without data are left so: whoever gives them some calls :func:`first_values`.

    Args:
        prefix: the network's name in the objective.
    """
    network.beginning = Beginning(seed, prefix)  # type: ignore[assignment]
    first_values(network, lambda name: True)


@torch.no_grad()
def first_values(
    network: nn.Module,
    wanted: Callable[[str], bool],
    write: Callable[[Tensor, Tensor], object] = lambda parameter, values: parameter.copy_(values),
) -> None:
    """The initial values of the wanted parameters of a network that :func:`initialise` has seen.

    Args:
        write: puts the whole values into a parameter, which may be a part of it.
    """
    beginning = network.beginning
    assert isinstance(beginning, Beginning)
    rules = {path: module for path, module in network.named_modules() if isinstance(module, StatesItsRule)}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if parameter.is_meta or not wanted(name):
                continue
            if isinstance(module, Norm | nn.GroupNorm):
                centred = isinstance(module, Norm) and module.centred
                parameter.fill_(0.0 if centred or name.endswith("bias") else 1.0)
                continue
            speaker = max((known for known in rules if _inside(name, known)), key=len, default=None)
            if speaker is None:
                raise TypeError(f"{type(network).__name__} does not say how {name} begins: it has no initial_std")
            relative = name[len(speaker) + 1 :] if speaker else name
            std = rules[speaker].initial_std(relative, parameter.shape)
            if std:
                draws = generator(beginning.seed, f"{beginning.prefix}.{name}")
                write(parameter, torch.empty(parameter.shape).normal_(std=std, generator=draws))
            else:
                parameter.zero_()


def _inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def fan_in_std(name: str, size: torch.Size) -> float:
    """0 for biases; for the weight of a linear layer or a convolution, what keeps its input's variance."""
    return 0.0 if name.endswith("bias") else 1 / math.sqrt(math.prod(size[1:]))

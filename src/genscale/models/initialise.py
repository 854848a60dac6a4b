"""Initial weights: each a pure function of the seed and the parameter's name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genscale.models.layers import Norm
from genscale.recipe.model import TransformerModel
from genscale.runtime.randomness import generator

BRANCH_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")
"""The last matrix of each residual branch."""


@torch.no_grad()
def initialise(network: nn.Module, seed: int, prefix: str = "model") -> None:
    """Give every parameter of ``network`` (which has a ``shape``) its initial value.

    A value depends on the seed and the parameter's full name alone, and so neither on the other layers nor on the
    machine. ``prefix`` is the network's name in the objective.
    """
    shape = network.shape
    assert isinstance(shape, TransformerModel)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if isinstance(module, Norm) or name.endswith("bias"):
                one = isinstance(module, Norm) and not module.centred and name.endswith("weight")
                parameter.fill_(1.0 if one else 0.0)
            else:
                parameter.copy_(initial_matrix(shape, parameter.shape, seed, f"{prefix}.{name}"))


def initial_matrix(shape: TransformerModel, size: torch.Size, seed: int, name: str) -> Tensor:
    """The initial value of the embedding or projection called ``name``, float32 on the CPU.

    Normal with the recipe's ``initial_std``; the branches' outputs are divided by sqrt(2 x layers), so that the
    residual stream's variance does not grow with depth (Radford et al. 2019, section 2.3), or start at zero.
    """
    std = shape.initial_std
    if name.endswith(BRANCH_OUTPUTS):
        if shape.zero_output_layers:
            return torch.zeros(size)
        std /= math.sqrt(2 * shape.layers)
    return torch.empty(size).normal_(std=std, generator=generator(seed, name))

"""Tensors of which a process has a part: from the part to the whole and back.

Weights that are split are DTensors, so that their names and whole shapes stay known everywhere. What is done to them
element by element (optimizers, averages) is done to the local parts, which are plain tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a plain tensor is all its own."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def alike(tensor: Tensor, part: Tensor) -> Tensor:
    """``part`` as a tensor that is split as ``tensor`` is; itself where that is plain."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of it, by a collective among the ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, tensor: Tensor) -> Tensor:
    """The part of ``full`` that this process has of a tensor that is split as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return full
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    # A strided shard is one of what the other dimensions leave: FSDP's part of a tensor-parallel part.
    steps = [(isinstance(placement, _StridedShard), dimension) for dimension, placement in enumerate(tensor.placements)]
    for _, dimension in sorted(steps):
        placement = tensor.placements[dimension]
        if isinstance(placement, Shard | _StridedShard):
            chunks = full.chunk(tensor.device_mesh.size(dimension), placement.dim)
            mine = coordinate[dimension]
            full = chunks[mine] if mine < len(chunks) else full.narrow(placement.dim, 0, 0)
    return full


def holders(tensor: Tensor, ranks: int) -> int:
    """How many of the ranks have the same part, where parts of a whole lie on all of them."""
    if not isinstance(tensor, DTensor):
        return ranks
    parts = 1
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard | _StridedShard):
            parts *= tensor.device_mesh.size(dimension)
    return ranks // parts


def leaves(network: nn.Module) -> dict[str, Tensor]:
    """What an optimizer updates: each trainable parameter's own part, in the parameter's memory, by name."""
    return {
        name: parameter if not isinstance(parameter, DTensor) else local(parameter)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in a parameter's place, under its name."""
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Give a tensor, which may be split, the values of the whole."""
    local(tensor).copy_(part_of(full, tensor))

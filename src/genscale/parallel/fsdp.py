"""Fully sharded data parallelism: weights, gradients and optimizer state in parts, whole only while they are used.

torch's FSDP2 (``fully_shard``), a group for each block and one for the rest. Gradients are summed, never averaged: the
loss is divided by the global number of valid elements already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from genscale.parallel.mesh import Mesh
from genscale.parallel.shards import local
from genscale.recipe.layout import Layout


def units(network: nn.Module) -> Iterator[nn.Module]:
    """The network's blocks: what stands in its lists and has no list of blocks inside."""
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            for element in child.children():
                within = list(units(element))
                if within:
                    yield from within
                elif any(True for _ in element.parameters()):
                    yield element
        else:
            yield from units(child)


def shard_unit(
    module: nn.Module, mesh: Mesh, layout: Layout, dtype: torch.dtype | None, keep: bool, experts: Iterable[nn.Module]
) -> None:
    """Split a module's parameters, those of ``experts`` inside it over the axes that do not split them yet.

    Args:
        dtype: of the copies that are computed with; None: the parameters' own.
        keep: the copies until the backward is over, as what is differentiated twice must.
    """
    policy: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
        if layout.offload
        else OffloadPolicy(),
    }
    for each in experts:
        places = mesh.grid(("replicate",), ("shard", "context"))
        fully_shard(
            each,
            mesh=places,
            reshard_after_forward=not keep,
            shard_placement_fn=partial(_expert_placement, ranks=places.size(places.ndim - 1)),
            **policy,
        )
        _sum_only(each)
    fully_shard(module, mesh=dense_places(mesh), reshard_after_forward=not keep, **policy)
    _sum_only(module)


def dense_places(mesh: Mesh) -> DeviceMesh:
    """Where parameters lie that every rank computes with: parts over one dimension, copies over the other."""
    return mesh.grid(("replicate",), ("shard", "expert", "context"))


def _expert_placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """By a dimension that tells no experts apart, where it divides: a rank may have few experts."""
    return Shard(1 if local(parameter).shape[1] % ranks == 0 else 0)


def _sum_only(module: nn.Module) -> None:
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    if not torch.accelerator.is_available():
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(network: nn.Module) -> list[FSDPModule]:
    """All that were split."""
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def collect(network: nn.Module, last: bool, keep: bool) -> None:
    """Before a micro-batch's backward: gradients are exchanged in the ``last`` one only, and added up until then.

    Args:
        keep: weights whole after the backward, for the phases that go through it twice.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        network.set_is_last_backward(last)
        network.set_reshard_after_backward(not keep)


def reshard(network: nn.Module) -> None:
    """Give up whole weights, which would be old ones after an update."""
    for module in sharded_modules(network):
        module.reshard()

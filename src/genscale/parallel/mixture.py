"""How a mixture of experts lies on the ranks: experts over ``expert``, their hidden width over ``tensor``."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Placement, Shard

from genscale.models.mixture import Experts, MixtureFeedForward, mixture_layers
from genscale.parallel.exchange import copied, summed
from genscale.parallel.expert import split_experts
from genscale.parallel.mesh import Mesh
from genscale.parallel.tensor import Region, column, row, split_weight


def split_mixtures(blocks: nn.Module, mesh: Mesh, region: Region | None) -> None:
    """Apply the rule to each mixture of the blocks.

    Args:
        region: of tensor parallelism, where there is any.
    """
    for layer in mixture_layers(blocks):
        split_weights(layer.experts, mesh)
        if mesh.size("expert") > 1:
            group = mesh.group("expert")
            assert group is not None
            split_experts(layer, group)
            layer.experts.split_over_experts = True  # type: ignore[assignment]
        if mesh.size("context") > 1:
            layer.sum_over_sequence = partial(_summed_both_ways, group=mesh.group("context"))
        if region is not None:
            _split_hidden(layer, region)


def split_weights(experts: Experts, mesh: Mesh) -> None:
    """Give this rank its experts, and of these its part of the hidden width."""
    for name, hidden in (("gate", 1), ("up", 1), ("down", 2)):
        placements: list[Placement] = [Shard(0)] if mesh.size("expert") > 1 else []
        placements += [Shard(hidden)] if mesh.size("tensor") > 1 else []
        if placements and getattr(experts, name) is not None:
            split_weight(experts, name, mesh.grid(("expert",), ("tensor",)), placements)


def _split_hidden(layer: MixtureFeedForward, region: Region) -> None:
    layer.auxiliary_share = 1 / region.mesh.size()  # every rank of the region computes the auxiliary losses
    if layer.shared is not None:
        for linear in (layer.shared.gate, layer.shared.up):
            if linear is not None:
                column(linear, region)
        row(layer.shared.down, region)
        down = layer.shared.down
        first = region.mesh.get_local_rank() == 0
        # Added up with the experts' outputs, and its bias so once.
        down.out_of = lambda y: y  # type: ignore[assignment]
        down.adds_bias = first  # type: ignore[assignment]
    layer.register_forward_pre_hook(lambda _, told: (region.into(told[0]),))
    layer.register_forward_hook(lambda _, told, y: region.out_of(y))


def _summed_both_ways(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A sum that each rank takes its own part of a loss of: gradients are summed as well."""
    return copied(summed(x, group), group)

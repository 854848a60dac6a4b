"""Expert parallelism: each rank of a group has some of a layer's experts, and tokens travel to them.

The ranks of the group hold different data. A rank computes its experts on the tokens of all ranks, so that the gradient
of their weights is that of the whole group already; all other weights are replicated, and theirs is to be summed.

Every rank of the group takes part in every forward and backward of the layer, also with a batch of no sequences.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from genscale.models.mixture import Experts, MixtureFeedForward, sorted_rows
from genscale.runtime.errors import UserError


def split_experts(layer: MixtureFeedForward, group: ProcessGroup) -> None:
    """Send tokens to the ranks of ``group`` that have their experts.

    The weights of ``layer.experts`` are to be this rank's slice (:func:`expert_slice`), or DTensors sharded by their
    first dimension.

    Raises:
        UserError: the group's size does not divide the number of experts.
    """
    expert_slice(layer.options.experts, group)
    layer.run_experts = partial(run_across, group=group)


def expert_slice(experts: int, group: ProcessGroup) -> slice:
    """The experts of this rank, out of all."""
    each, rest = divmod(experts, group.size())
    if rest:
        raise UserError(
            f"layout.expert: {group.size()} ranks cannot share the {experts} experts of model.mixture evenly; "
            "it must divide their number"
        )
    return slice(group.rank() * each, (group.rank() + 1) * each)


def run_across(experts: Experts, rows: Tensor, counts: Tensor, group: ProcessGroup) -> Tensor:
    """As :meth:`Experts.forward`, for rows sorted by expert over all of the group's experts.

    Args:
        rows: (rows, width).
        counts: (experts,) int64: the rows of each expert, of this rank's tokens.
    """
    ranks = group.size()
    sent = counts.view(ranks, -1)  # (ranks, experts of a rank)
    received = torch.empty_like(sent)  # from each rank, for each expert here
    distributed.all_to_all_single(received, sent.contiguous(), group=group)
    sizes = torch.stack((sent.sum(1), received.sum(1))).tolist()  # the one wait for the device
    there, here = sizes
    arrived = _AllToAll.apply(rows, there, here, group)  # by rank, then by expert
    local = torch.arange(received.shape[1], device=rows.device).repeat(ranks)
    expert_of = local.repeat_interleave(received.flatten(), output_size=sum(here))  # (arrived rows,)
    by_expert, put_back = sorted_rows(arrived, expert_of.argsort(stable=True))
    done = put_back(experts(by_expert, received.sum(0)))
    return _AllToAll.apply(done, here, there, group)


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks: ``there[r]`` go to rank r, ``here[r]`` come from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: list[int], here: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (there, here), group
        arrived = rows.new_empty(sum(here), rows.shape[1])
        distributed.all_to_all_single(arrived, rows.contiguous(), here, there, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        there, here = ctx.sizes
        return _AllToAll.apply(gradient, here, there, ctx.group), None, None, None

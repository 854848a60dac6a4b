"""Exchanges between ranks that autograd knows the backward of.

In pairs (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2): what goes forward as a copy comes back
as a sum, what goes forward as a gathering comes back as a scattered sum, and the other way round. Tokens are the second
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from genscale.runtime.collectives import gather_into, scatter_sum_into


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous().clone()
    distributed.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """(..., part, ...) of every rank, put together along ``dim`` in the ranks' order."""
    ranks = distributed.get_world_size(group)
    x = x.contiguous()
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    gather_into(out, x, group)
    return torch.cat(out.chunk(ranks), dim=dim)


def _scattered_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along ``dim`` of the sum over ranks."""
    ranks = distributed.get_world_size(group)
    stacked = torch.cat(x.chunk(ranks, dim)).contiguous()
    out = stacked.new_empty(stacked.shape[0] // ranks, *stacked.shape[1:])
    scatter_sum_into(out, stacked, group)
    return out


def _own(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return x.chunk(distributed.get_world_size(group), dim)[distributed.get_rank(group)].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, partial: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.partial = group, dim, partial
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back = _scattered_sum if ctx.partial else _own
        return back(gradient, ctx.group, ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, partial: bool) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return (_scattered_sum if partial else _own)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered(gradient, ctx.group, ctx.dim), None, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """The same, whose gradient is multiplied."""
    return _ScaledGradient.apply(x, factor)


def copied(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The same on all ranks, each of which goes on to a part of the work: its gradient is the sum of theirs."""
    return x if group is None else _Copy.apply(x, group)


def summed(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' parts, with which all of them go on alike."""
    return x if group is None else _Sum.apply(x, group)


def gathered(x: Tensor, group: ProcessGroup | None, dim: int = 1, partial: bool = True) -> Tensor:
    """The ranks' parts put together. ``partial``: each rank goes on to a part of the work, so that gradients are added;
    else all go on alike."""
    return x if group is None else _Gather.apply(x, group, dim, partial)


def scattered(x: Tensor, group: ProcessGroup | None, dim: int = 1, partial: bool = True) -> Tensor:
    """This rank's part of what all of them have: of the sum where each has a ``partial`` one, else of the same."""
    return x if group is None else _Scatter.apply(x, group, dim, partial)

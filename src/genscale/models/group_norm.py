"""Group normalisation, with what follows it in image networks: a scale and a shift that are told, and SiLU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """Normalised over groups of channels (Wu and He 2018). The output has its input's dtype, under autocast too.

    Args:
        groups: they divide the channels.
        channels: of the input.
        activated: SiLU at the end.
        epsilon: added to the variance.
    """

    def __init__(self, groups: int, channels: int, activated: bool = False, epsilon: float = 1e-5):
        super().__init__(groups, channels, epsilon)
        self.activated = activated

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(batch, channels, height, width) to the same: activation(norm(x) (1 + scale) + shift).

        Args:
            x: the images.
            scale, shift: (batch, channels); None: none. Only where it is activated.
        """
        with torch.autocast(x.device.type, enabled=False):
            # A CPU takes float32 weights as they are, and adds up their gradients in float32.
            dtype = self.weight.dtype if x.device.type == "cpu" else x.dtype
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            if self.activated:
                return _Activated.apply(x, weight, bias, scale, shift, self.num_groups, self.eps)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class _Activated(torch.autograd.Function):
    """Norm, scale, shift and SiLU that keep nothing but their input: the steps between are made again in the backward.

    As separate operations they keep three or four tensors as large as the image, for the same time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        groups: int,
        epsilon: float,
    ) -> Tensor:
        x = x.contiguous()
        y, mean, reciprocal = _norm(x, weight, bias, groups, epsilon)
        if scale is not None and shift is not None:
            y = torch.addcmul(shift[:, :, None, None], y, 1 + scale[:, :, None, None], out=y)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, reciprocal)
        ctx.groups, ctx.epsilon = groups, epsilon
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("an activated GroupNorm differentiates once")
        x, weight, bias, scale, shift, mean, reciprocal = ctx.saved_tensors
        normed = before = _norm(x, weight, bias, ctx.groups, ctx.epsilon)[0]
        factor = None if scale is None else 1 + scale[:, :, None, None]
        if factor is not None:
            before = torch.addcmul(shift[:, :, None, None], normed, factor)
        d_before = torch.ops.aten.silu_backward(gradient.contiguous(), before)
        d_scale = d_shift = None
        if factor is not None:
            flat = d_before.flatten(2)
            d_scale, d_shift = torch.linalg.vecdot(flat, normed.flatten(2)), flat.sum(2)
            d_before.mul_(factor)
        sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), ctx.groups)
        d_x, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
            d_before, x, mean, reciprocal, weight, *sizes, [True, True, True]
        )
        return d_x, d_weight, d_bias, d_scale, d_shift, None, None


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised images, and each group's mean and reciprocal standard deviation."""
    return torch.native_group_norm(x, weight, bias, x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups, epsilon)

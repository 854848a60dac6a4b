"""Attention on a CPU: matrix products over blocks of queries.

torch's own CPU kernel spends most of its time outside matrix products. In bfloat16 this one takes 0.26 to 0.6 of its
time, forward and backward, over contexts of 64 to 2048; in float32 0.75 to 1.1 (docs/experiments.md). Blocks skip the
keys that causality or a window hides; where nothing is hidden, as among the patches of an image, torch's kernel is
ahead in float32: 0.7 to 0.9 of this one's time over 49 to 1024 tokens. The probabilities are kept for the backward:
tokens x context / 2 numbers per head and layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.models.mask import AttentionMask

LARGEST_PROBABILITIES = 256 * 2**20
"""Bytes of probabilities kept in one layer, above which the fused kernel, which keeps none, is the better choice."""


SHORTEST_IN_FULL_PRECISION = 256
"""Queries from which this is the faster way in float32, where keys are hidden; in bfloat16 it always is."""


def blocks_pay(queries: Tensor, keys: Tensor, mask: AttentionMask) -> bool:
    """Whether this is the better kernel: whole sequences on a CPU whose probabilities fit in memory."""
    faster = not mask.all_visible and queries.shape[2] >= SHORTEST_IN_FULL_PRECISION
    return (
        queries.device.type == "cpu"
        and queries.shape[2] == keys.shape[2]
        and (queries.element_size() < 4 or faster)
        and bytes_of_probabilities(queries, mask) <= LARGEST_PROBABILITIES
    )


def block_of(queries: int) -> int:
    """Queries in a block: enough for efficient products, few enough for what causality hides to be skipped."""
    return 64 if queries <= 256 else 128


def bytes_of_probabilities(queries: Tensor, mask: AttentionMask) -> int:
    block = block_of(mask.queries)
    seen = 0
    for first in range(0, mask.queries, block):
        low, high = mask.key_range(first, min(first + block, mask.queries))
        seen += block * (high - low)
    return queries.shape[0] * queries.shape[1] * seen * queries.element_size()


def blockwise_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, scale: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scale * queries keys^T + mask) values.

    Args:
        queries: (batch, heads, queries, head_width).
        keys, values: (batch, key_value_heads, keys, head_width); heads share them in consecutive groups.
        mask: which keys a query sees.
        scale: factor on the scores.
        dropout: rate on the probabilities, drawn from torch's own generator.

    Returns:
        (batch, heads, queries, head_width).
    """
    bias = None
    if not mask.all_visible:  # where only causality hides keys, each block's own columns alone are partly hidden
        bias = mask.triangle(block_of(mask.queries), queries.dtype) if mask.plain else mask.bias(queries.dtype)
    return _Blockwise.apply(queries, keys, values, bias, mask, scale, dropout)


class _Blockwise(torch.autograd.Function):
    # Below: N = batch x key_value_heads, G = heads that share a key, Q = queries in the block, K = keys in its range.

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        mask: AttentionMask,
        scale: float,
        dropout: float,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            batch, heads, length, width = queries.shape
            groups = heads // keys.shape[1]
            ctx.mask, ctx.scale, ctx.dropout, ctx.block = mask, scale, dropout, block_of(length)
            q = (queries * scale).reshape(-1, groups, length, width)  # (N, G, queries, width)
            k, v = keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])  # (N, keys, width)
            output = torch.empty_like(q, memory_format=torch.contiguous_format)
            kept: list[Tensor] = []
            for first in range(0, length, ctx.block):
                last = min(first + ctx.block, length)
                low, high = mask.key_range(first, last)
                scores = torch.bmm(q[:, :, first:last].flatten(1, 2), k[:, low:high].transpose(1, 2))  # (N, G Q, K)
                if bias is not None and mask.plain:
                    size = last - first
                    scores.view(-1, groups, size, high - low)[..., high - low - size :].add_(bias[:size, :size])
                elif bias is not None:
                    hidden = bias[:, :, None, first:last, low:high]  # (batch or 1, 1, 1, Q, K)
                    scores.view(batch, -1, groups, last - first, high - low).add_(hidden)
                probabilities = torch.softmax(scores, -1)
                kept.append(probabilities)
                if dropout:
                    probabilities, alive = torch.native_dropout(probabilities, dropout, True)
                    kept.append(alive)
                output[:, :, first:last] = torch.bmm(probabilities, v[:, low:high]).unflatten(1, (groups, -1))
            ctx.save_for_backward(q, k, v, *kept)
            return output.view(batch, heads, length, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("blockwise attention differentiates once; use sdpa_kernel(SDPBackend.MATH)")
        q, k, v, *kept = ctx.saved_tensors
        batch, heads, length, width = gradient.shape
        groups = q.shape[1]
        gradient = gradient.reshape(q.shape)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        saved = iter(kept)
        for first in range(0, length, ctx.block):
            last = min(first + ctx.block, length)
            low, high = ctx.mask.key_range(first, last)
            q_block, d_output = q[:, :, first:last].flatten(1, 2), gradient[:, :, first:last].flatten(1, 2)
            probabilities = dropped_out = next(saved)
            d_probabilities = torch.bmm(d_output, v[:, low:high].transpose(1, 2))
            if ctx.dropout:
                alive, factor = next(saved), 1 / (1 - ctx.dropout)
                dropped_out = torch.ops.aten.native_dropout_backward(probabilities, alive, factor)
                d_probabilities = torch.ops.aten.native_dropout_backward(d_probabilities, alive, factor)
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            d_q[:, :, first:last] = torch.bmm(d_scores, k[:, low:high]).unflatten(1, (groups, -1))
            d_k[:, low:high] += torch.bmm(d_scores.transpose(1, 2), q_block)  # q carries the scale
            d_v[:, low:high] += torch.bmm(dropped_out.transpose(1, 2), d_output)
        d_q.mul_(ctx.scale)
        split = (batch, -1, *k.shape[1:])
        return d_q.view(batch, heads, length, width), d_k.view(split), d_v.view(split), None, None, None, None

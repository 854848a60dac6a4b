"""Attention in blocks of queries and keys, merged by their log-sum-exps, while keys and values travel round a ring.

Liu et al. 2023, "Ring attention with blockwise transformers". Each rank keeps its queries; keys and values go from rank
to rank, and on the way back their gradients go with them. What a rank computes on what it holds is exact attention
with its normaliser, so the parts merge to the same numbers as attention on the whole. Nothing but queries, keys,
values, output and normaliser is kept for the backward, which computes the scores again.

A block is one call of the fused kernel where there is one that gives the normaliser: on a CPU always, on CUDA in half
precision where a block is wholly visible or the causal triangle. The rest, soft-capped scores above all, is written in
matrix products. The CUDA kernel's calls have not been run by our tests, which have no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from genscale.models.mask import AttentionMask

TILE = 256
"""Queries in a block whose hidden keys, or whose scores, are written out: few enough for what is hidden to be cut."""


class Block(NamedTuple):
    """Queries and keys whose scores are computed at once."""

    queries: slice
    """Of those here."""
    keys: slice
    """Of those held."""
    triangle: bool = False
    """A query sees the keys up to its own place."""
    partly: tuple[range, range] | None = None
    """Rows and columns of the whole mask, where it hides some of them otherwise."""

    @property
    def plain(self) -> bool:
        """Whether every query sees every key."""
        return not self.triangle and self.partly is None


def plan_blocks(mask: AttentionMask, rows: Sequence[range], columns: Sequence[range], fused: bool) -> list[Block]:
    """The blocks in which any query sees a key.

    Args:
        mask: of the whole sequence.
        rows: what the queries here are in the whole sequence, as ranges of equal length, in order.
        columns: the same of the keys held.
        fused: a kernel takes a block of any size; otherwise all are tiles.
    """
    spans = _document_spans(mask.documents, {*rows, *columns})
    blocks: list[Block] = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            one_document = False
            if spans:
                pairs = list(zip(*spans[row], *spans[column], strict=True))
                one_document = all(first == last == low == high for first, last, low, high in pairs)
                if all(last < low or high < first for first, last, low, high in pairs):
                    continue
            for some, keys, triangle, partly in _pieces(mask, row, column, one_document, fused):
                queries = _shift(some, i * len(row) - row.start)
                held = _shift(keys, j * len(column) - column.start)
                plain, last = not (triangle or partly), blocks[-1] if blocks else None
                if last and plain and last.plain and last.queries == queries and last.keys.stop == held.start:
                    held = slice(blocks.pop().keys.start, held.stop)  # one wider block
                blocks.append(Block(queries, held, triangle, (some, keys) if partly else None))
    return blocks


def _pieces(
    mask: AttentionMask, row: range, column: range, one_document: bool, fused: bool
) -> Iterator[tuple[range, range, bool, bool]]:
    """(queries, keys, triangle, partly) where a query of ``row`` sees a key of ``column``: one, or a tile each."""
    low, high = mask.key_range(row.start, row.stop)
    keys = range(max(low, column.start), min(high, column.stop))
    if not keys:
        return
    farthest = max(row[-1] - keys[0], keys[-1] - row[0])
    regular = mask.start is None and (mask.documents is None or one_document)
    regular = regular and (mask.window is None or farthest < mask.window)
    triangle = mask.causal and regular and row == keys and fused
    plain = regular and not (mask.causal and keys[-1] > row[0])
    if len(row) <= TILE or (fused and (triangle or plain)):
        yield row, keys, triangle, not (triangle or plain)
    else:
        for first in range(row.start, row.stop, TILE):
            yield from _pieces(mask, range(first, min(first + TILE, row.stop)), column, one_document, fused)


def _shift(places: range, by: int) -> slice:
    return slice(places.start + by, places.stop + by)


def _document_spans(documents: Tensor | None, ranges: set[range]) -> dict[range, tuple[list[int], list[int]]]:
    """The least and the greatest document in each range, one number for each sequence of the batch."""
    if documents is None:
        return {}
    extremes = [torch.stack(torch.aminmax(documents[:, r.start : r.stop], dim=1)) for r in ranges]
    return dict(zip(ranges, torch.stack(extremes).tolist(), strict=True))


def visible(mask: AttentionMask, rows: range, columns: range) -> Tensor:
    """(batch or 1, 1, rows, columns) bool: these rows and columns of the whole ``mask.visible()``."""
    query = torch.arange(rows.start, rows.stop, device=mask.device)[:, None]
    key = torch.arange(columns.start, columns.stop, device=mask.device)
    seen = (key <= query if mask.causal else key >= 0).expand(len(rows), len(columns))
    if mask.window is not None:
        seen = seen & ((query - key).abs() < mask.window)
    seen = seen[None]
    if mask.documents is not None:
        documents = mask.documents
        seen = seen & (documents[:, rows.start : rows.stop, None] == documents[:, None, columns.start : columns.stop])
    if mask.start is not None:
        seen = (seen & (key >= mask.start[:, None])[:, None, :]) | (key == query)
    return seen[:, None]


class Scores(NamedTuple):
    """How scores are made of queries and keys."""

    mask: AttentionMask
    scale: float
    soft_cap: float | None


def kernel_is_fused(queries: Tensor, mask: AttentionMask, soft_cap: float | None) -> bool:
    if soft_cap is not None:
        return False
    if queries.device.type == "cpu":
        return True
    plain = mask.window is None and mask.documents is None and mask.start is None
    half = queries.dtype in (torch.bfloat16, torch.float16)
    return queries.device.type == "cuda" and plain and half and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 256


def blocks_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    steps: list[list[Block]],
    ring: dist.ProcessGroup | None = None,
) -> Tensor:
    """Exact attention of the queries here over all keys that pass by.

    Args:
        queries: (batch, heads, queries, head_width).
        keys, values: (batch, key_value_heads, keys, head_width), those of this rank.
        scores: the mask of the whole sequence, and what is done to scores.
        steps: the blocks to compute on what is held at each step: at step s that of the rank s places before.
        ring: over which keys and values travel; None: they stay, and there is one step.

    Returns:
        (batch, heads, queries, head_width).
    """
    return _BlocksAttention.apply(queries, keys, values, scores, steps, ring)


class _BlocksAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scores: Scores,
        steps: list[list[Block]],
        ring: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.scores, ctx.steps, ctx.ring = scores, steps, ring
        batch, heads, length, width = queries.shape
        exact = _accumulator(queries.dtype)
        # Laid out by tokens, as the output projection reads it.
        output = queries.new_zeros((batch, length, heads, width), dtype=exact).transpose(1, 2)
        normaliser = queries.new_full((batch, heads, length), -torch.inf, dtype=exact)  # log-sum-exp of scores
        held = torch.stack((keys, values))  # (2, batch, key_value_heads, keys, head_width): one message
        with torch.autocast(queries.device.type, enabled=False):
            for step, blocks in enumerate(steps):
                on_the_way = _pass_on([held], ring) if step + 1 < len(steps) else None
                for block in blocks:
                    q, k, v = queries[:, :, block.queries], *held[:, :, :, block.keys]
                    part, part_normaliser = _block_forward(q, k, v, block, scores)
                    _merge(output[:, :, block.queries], normaliser[:, :, block.queries], part, part_normaliser)
                if on_the_way:
                    [held] = on_the_way.wait()
        output = output.to(queries.dtype)
        ctx.save_for_backward(queries, keys, values, output, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("attention over context parallel ranks differentiates once")
        queries, keys, values, output, normaliser = ctx.saved_tensors
        exact = _accumulator(queries.dtype)
        d_queries = torch.zeros_like(queries, dtype=exact)
        held = torch.stack((keys, values))
        d_held = torch.zeros_like(held, dtype=exact)  # gradients of what is held, by the ranks that held it so far
        with torch.autocast(queries.device.type, enabled=False):
            for step, blocks in enumerate(ctx.steps):
                # Keys and values are one step ahead of their gradients, which wait for this rank's part.
                leaving = ([held] if step + 1 < len(ctx.steps) else []) + ([d_held] if step else [])
                on_the_way = _pass_on(leaving, ctx.ring) if leaving else None
                d_here = torch.zeros_like(d_held) if step else d_held
                for block in blocks:
                    q, k, v = queries[:, :, block.queries], *held[:, :, :, block.keys]
                    y, n = output[:, :, block.queries], normaliser[:, :, block.queries]
                    parts = _block_backward(gradient[:, :, block.queries], q, k, v, y, n, block, ctx.scores)
                    d_queries[:, :, block.queries] += parts[0]
                    d_here[0, :, :, block.keys] += parts[1]
                    d_here[1, :, :, block.keys] += parts[2]
                arrived = on_the_way.wait() if on_the_way else []
                if step:
                    d_here += arrived.pop()
                d_held = d_here
                if arrived:
                    [held] = arrived
            if len(ctx.steps) > 1:
                [d_held] = _pass_on([d_held], ctx.ring).wait()  # home
        d_keys, d_values = d_held.to(keys.dtype)
        return d_queries.to(queries.dtype), d_keys, d_values, None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _OnTheWay(NamedTuple):
    sent: list[Tensor]  # must live until it has gone
    arriving: list[Tensor]
    works: list[dist.Work]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.arriving


def _pass_on(tensors: list[Tensor], ring: dist.ProcessGroup | None) -> _OnTheWay:
    """Begin to send each tensor to the next rank and to receive the previous one's."""
    assert ring is not None
    rank, size = dist.get_rank(ring), dist.get_world_size(ring)
    arriving = [torch.empty_like(tensor) for tensor in tensors]
    exchanges = []
    for tensor, place in zip(tensors, arriving, strict=True):
        exchanges.append(dist.P2POp(dist.isend, tensor, group=ring, group_peer=(rank + 1) % size))
        exchanges.append(dist.P2POp(dist.irecv, place, group=ring, group_peer=(rank - 1) % size))
    return _OnTheWay(tensors, arriving, dist.batch_isend_irecv(exchanges))


def _merge(output: Tensor, normaliser: Tensor, part: Tensor, part_normaliser: Tensor) -> None:
    """Attention over the keys of both, from attention over either: weighted by their sums of exponentials, in place."""
    part_normaliser = part_normaliser.to(normaliser.dtype)
    weight = torch.sigmoid(part_normaliser - normaliser)  # exp(p) / (exp(p) + exp(n))
    weight.masked_fill_(part_normaliser == -torch.inf, 0)  # sees nothing here; nor, perhaps, did it before
    output.lerp_(part.to(output.dtype), weight.unsqueeze(-1))
    normaliser.copy_(torch.logaddexp(normaliser, part_normaliser))


def _block_forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scores: Scores) -> tuple[Tensor, Tensor]:
    """Output, (batch, heads, queries, head_width), and normaliser, (batch, heads, queries), over the block's keys."""
    seen = visible(scores.mask, *block.partly) if block.partly else None
    if not kernel_is_fused(q, scores.mask, scores.soft_cap):
        logits, _ = _logits(q, k, seen, scores)
        normaliser = logits.logsumexp(-1, keepdim=True)
        probabilities = (logits - normaliser.masked_fill(normaliser == -torch.inf, 0)).exp_()
        return torch.matmul(probabilities.to(v.dtype), v.unsqueeze(2)).flatten(1, 2), normaliser[..., 0].flatten(1, 2)
    if q.device.type == "cuda":
        output, normaliser, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, block.triangle, False, scale=scores.scale
        )
        return output, normaliser
    output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, block.triangle, attn_mask=_bias(seen, q.dtype), scale=scores.scale
    )
    if seen is not None:  # of a query that sees none of these keys the kernel gives 0
        normaliser = normaliser.masked_fill(~seen.any(-1), -torch.inf)
    return output, normaliser


def _block_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, normaliser: Tensor, block: Block, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``output`` and ``normaliser`` are those over all keys, not this block's alone."""
    seen = visible(scores.mask, *block.partly) if block.partly else None
    if not kernel_is_fused(q, scores.mask, scores.soft_cap):
        return _products_backward(gradient, q, k, v, output, normaliser, seen, scores)
    if q.device.type == "cuda":
        unused = q.new_empty(0, dtype=torch.int64)  # the random state of dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, output, normaliser.contiguous(), None, None, q.shape[2], k.shape[2], 0.0,
            block.triangle, unused, unused, scale=scores.scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, output, normaliser, 0.0, block.triangle, attn_mask=_bias(seen, q.dtype), scale=scores.scale
    )


def _bias(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if seen is None else torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _logits(q: Tensor, k: Tensor, seen: Tensor | None, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """(batch, key_value_heads, groups, queries, keys), and the hyperbolic tangent that capped them."""
    q = (q * scores.scale).unflatten(1, (k.shape[1], -1))  # (batch, key_value_heads, groups, queries, head_width)
    logits = torch.matmul(q, k.unsqueeze(2).transpose(-1, -2)).to(_accumulator(q.dtype))
    tangent = None
    if scores.soft_cap is not None:
        tangent = torch.tanh(logits / scores.soft_cap)
        logits = tangent * scores.soft_cap
    return logits if seen is None else logits.masked_fill_(~seen.unsqueeze(2), -torch.inf), tangent


def _products_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    normaliser: Tensor,
    seen: Tensor | None,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    logits, tangent = _logits(q, k, seen, scores)
    split = (k.shape[1], -1)
    gradient, output, normaliser = (x.unflatten(1, split) for x in (gradient, output, normaliser))
    probabilities = (logits - normaliser.unsqueeze(-1)).exp_()
    d_probabilities = torch.matmul(gradient, v.unsqueeze(2).transpose(-1, -2)).to(probabilities.dtype)
    towards = (gradient.to(probabilities.dtype) * output.to(probabilities.dtype)).sum(-1, keepdim=True)
    d_logits = probabilities * (d_probabilities - towards)
    if tangent is not None:
        d_logits = d_logits * (1 - tangent * tangent)
    d_logits = (d_logits * scores.scale).to(q.dtype)
    d_q = torch.matmul(d_logits, k.unsqueeze(2)).flatten(1, 2)
    # Heads that share a key: their queries are more rows of one product.
    d_k = torch.matmul(d_logits.flatten(2, 3).transpose(-1, -2), q.unflatten(1, split).flatten(2, 3))
    weights = probabilities.to(v.dtype).flatten(2, 3)
    return d_q, d_k, torch.matmul(weights.transpose(-1, -2), gradient.flatten(2, 3))

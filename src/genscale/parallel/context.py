"""Exact attention over a sequence that is split over ranks: context parallelism.

torch's own has no CPU path (2.13), and knows neither windows nor documents nor soft caps. Two methods, the same
numbers:

- ``all_gather``: every rank gathers all keys and values, for which it needs the memory. One message, in one piece.
- ``ring``: keys and values travel from rank to rank while the part that is here is computed (parallel/ring.py).
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from genscale.models.attention import attend
from genscale.models.mask import AttentionMask
from genscale.parallel.exchange import gathered
from genscale.parallel.ring import Block, Scores, blocks_attention, kernel_is_fused, plan_blocks, visible
from genscale.runtime.errors import UserError

Method = Literal["all_gather", "ring"]


class Portions:
    """Which tokens of a sequence each rank has: of 2c equal chunks rank r has the r-th and the r-th from the end.

    So every rank has equally much to do under a causal mask, where later queries see more keys.

    Args:
        tokens: of the whole sequence.
        ranks: c, over which it is split.
        rank: this one's number among them.
    """

    def __init__(self, tokens: int, ranks: int, rank: int):
        if tokens % (2 * ranks) or tokens < 2 * ranks:
            raise UserError(
                f"a sequence of {tokens} tokens cannot be split over {ranks} ranks: "
                f"its length must be a multiple of {2 * ranks} (two equal chunks for each rank)"
            )
        self.tokens, self.ranks, self.rank = tokens, ranks, rank
        self.chunk = tokens // (2 * ranks)
        # A mask is shared by the layers of one forward, and so is what is made of it; that goes when the mask goes.
        self._plans: WeakKeyDictionary[AttentionMask, dict[Any, list[list[Block]]]] = WeakKeyDictionary()
        self._rows: WeakKeyDictionary[AttentionMask, list[RowsOfMask]] = WeakKeyDictionary()

    def chunks(self, rank: int) -> tuple[range, range]:
        """The two stretches of the whole sequence that a rank has."""
        first, second = rank, 2 * self.ranks - 1 - rank
        return self._chunk(first), self._chunk(second)

    def _chunk(self, number: int) -> range:
        return range(number * self.chunk, (number + 1) * self.chunk)

    def of(self, rank: int, device: torch.device | None = None) -> Tensor:
        """(tokens / ranks,) int64: places in the whole sequence of a rank's tokens."""
        return torch.cat([torch.arange(c.start, c.stop, device=device) for c in self.chunks(rank)])

    def here(self, device: torch.device | None = None) -> Tensor:
        """(tokens / ranks,) int64: places in the whole sequence of this rank's tokens, as for rotary embedding."""
        return self.of(self.rank, device)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole tensor."""
        return torch.cat([x.narrow(dim, chunk.start, len(chunk)) for chunk in self.chunks(self.rank)], dim)

    def split(self, x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank has whole; its gradient is the part of a sum over ranks.

        That is ``take``: elsewhere the gradient is zero, and summing it over the ranks is left to whoever sums theirs.
        """
        return self.take(x, dim)

    def join(self, x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
        """The whole tensor, in order, from every rank's part; the gradient is summed over the ranks' copies."""
        parts = gathered(x, group, dim).chunk(2 * self.ranks, dim)  # two of rank 0, two of rank 1, ...
        return torch.cat(parts[0::2] + parts[::-2], dim)

    def plan(self, mask: AttentionMask, method: Method, fused: bool) -> list[list[Block]]:
        """The blocks of scores that this rank computes, for each step of the ring; gathering is one step."""
        plans = self._plans.setdefault(mask, {})
        if (method, fused) not in plans:
            rows = self.chunks(self.rank)
            if method == "ring":
                held = [self.chunks((self.rank - step) % self.ranks) for step in range(self.ranks)]
                plans[method, fused] = [plan_blocks(mask, rows, columns, fused) for columns in held]
            else:
                columns = [self._chunk(number) for number in range(2 * self.ranks)]
                plans[method, fused] = [plan_blocks(mask, rows, columns, fused)]
        return plans[method, fused]

    def rows(self, mask: AttentionMask) -> list[RowsOfMask]:
        """The mask of each chunk here over what it sees of the whole sequence."""
        if mask not in self._rows:
            self._rows[mask] = [RowsOfMask(mask, chunk) for chunk in self.chunks(self.rank)]
        return self._rows[mask]


def context_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: AttentionMask,
    scale: float,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    *,
    portions: Portions,
    group: dist.ProcessGroup,
    method: Method,
) -> Tensor:
    """``attend`` on the whole sequence, of which each rank gives and gets its own tokens.

    Args:
        queries: (batch, heads, tokens / ranks, head_width).
        keys, values: (batch, key_value_heads, tokens / ranks, head_width).
        mask: of the whole sequence.
        scale: factor on the scores.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        dropout: rate on the probabilities; not on the ring.
        portions: which tokens each rank has.
        group: the ranks, in the order of ``portions``.
        method: how keys and values come to the queries.

    Returns:
        (batch, heads, tokens / ranks, head_width).
    """
    if not (mask.queries == mask.keys == portions.tokens and queries.shape[2] * portions.ranks == portions.tokens):
        raise ValueError(
            f"a mask of {mask.queries} queries and {mask.keys} keys, and {queries.shape[2]} tokens on each of "
            f"{portions.ranks} ranks, do not make a sequence of {portions.tokens}"
        )
    fused = kernel_is_fused(queries, mask, soft_cap)
    if method == "ring":
        if dropout:
            raise ValueError("ring attention has no dropout on probabilities: use all_gather")
        steps = portions.plan(mask, method, fused)
        return blocks_attention(queries, keys, values, Scores(mask, scale, soft_cap), steps, group)
    keys, values = portions.join(torch.stack((keys, values)), group, dim=3)
    if queries.device.type == "cpu" and not dropout:
        # No mask to keep; in float32 0.85 to 0.9 of the time of torch's kernel with a causal mask written out.
        steps = portions.plan(mask, method, fused)
        return blocks_attention(queries, keys, values, Scores(mask, scale, soft_cap), steps)
    outputs = []
    for part, rows in zip(queries.chunk(2, dim=2), portions.rows(mask), strict=True):
        k, v = (x[:, :, rows.columns.start : rows.columns.stop] for x in (keys, values))
        outputs.append(attend(part, k, v, rows, scale, soft_cap, dropout))
    return torch.cat(outputs, dim=2)


class RowsOfMask(AttentionMask):
    """Some rows of a whole sequence's mask, over ``columns``, those that they see any of."""

    def __init__(self, whole: AttentionMask, rows: range):
        low, high = whole.key_range(rows.start, rows.stop)
        self.columns, self._offset = range(low, high), rows.start - low
        documents = None if whole.documents is None else whole.documents[:, low:high]
        start = None if whole.start is None else whole.start - low
        super().__init__(len(rows), high - low, whole.causal, whole.window, documents, start, whole.device)

    @property
    def offset(self) -> int:
        """Column of the first query; without causality more columns follow the last."""
        return self._offset

    def _compute_visible(self) -> Tensor:
        return visible(self, range(self.offset, self.offset + self.queries), range(self.keys))

"""Which keys each query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor


class AttentionMask:
    """Which keys each query may attend to: made once per forward, shared by the layers.

    Queries are the last ``queries`` of the ``keys`` columns, so with a cache they begin at ``keys - queries``.

    Args:
        queries: number of queries.
        keys: number of keys.
        causal: a query sees no later key.
        window: a query sees keys less than this many columns away, itself included.
        documents: (batch, keys) integers; a query sees keys of its own document.
        start: (batch,) first real column of each row; those before it are padding, seen by themselves alone.
    """

    def __init__(
        self,
        queries: int,
        keys: int,
        causal: bool = True,
        window: int | None = None,
        documents: Tensor | None = None,
        start: Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.queries, self.keys, self.causal, self.documents, self.start = queries, keys, causal, documents, start
        self.window = window if window is not None and window < keys else None
        self.device = device
        self._visible: Tensor | None = None
        self._bias: Tensor | None = None
        self._triangle: Tensor | None = None
        self.flex_mask: object = None
        """The block mask of models/flex.py, kept here so that it is made once per forward."""

    @property
    def offset(self) -> int:
        """Column of the first query."""
        return self.keys - self.queries

    @property
    def plain(self) -> bool:
        """Whether nothing but causality hides a key."""
        return self.window is None and self.documents is None and self.start is None

    @property
    def triangular(self) -> bool:
        """The usual causal mask, which kernels know by itself."""
        return self.plain and self.causal and self.queries == self.keys

    @property
    def all_visible(self) -> bool:
        return self.plain and (not self.causal or self.queries == 1)

    def key_range(self, first: int, last: int) -> tuple[int, int]:
        """The columns that any of the queries ``first`` to ``last`` (exclusive) may see."""
        first, last = first + self.offset, last + self.offset
        low = 0 if self.window is None else max(0, first - self.window + 1)
        if self.causal:
            return low, last
        return low, self.keys if self.window is None else min(self.keys, last + self.window - 1)

    def visible(self) -> Tensor:
        """(batch or 1, 1, queries, keys) bool: True where a query sees a key."""
        if self._visible is None:
            self._visible = self._compute_visible()
        return self._visible

    def _compute_visible(self) -> Tensor:
        key = torch.arange(self.keys, device=self.device)
        query = key[self.offset :].unsqueeze(-1)
        visible = torch.ones(self.queries, self.keys, dtype=torch.bool, device=self.device)
        if self.causal:
            visible = key <= query
        if self.window is not None:
            visible = visible & ((query - key).abs() < self.window)
        visible = visible[None]  # (1, queries, keys)
        if self.documents is not None:
            visible = visible & (self.documents[:, self.offset :, None] == self.documents[:, None, :])
        if self.start is not None:
            # Padding sees itself, since a softmax over nothing is not a number.
            visible = (visible & (key >= self.start[:, None])[:, None, :]) | (key == query)
        return visible[:, None]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The same as zeros and minus infinities, to be added to the scores."""
        if self._bias is None or self._bias.dtype != dtype:
            visible = self.visible()
            self._bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)
        return self._bias

    def triangle(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size, size): the causal bias of equally many queries and keys, minus infinity above the diagonal."""
        if self._triangle is None or self._triangle.shape[0] < size or self._triangle.dtype != dtype:
            self._triangle = torch.full((size, size), -torch.inf, dtype=dtype, device=self.device).triu_(1)
        return self._triangle[:size, :size]

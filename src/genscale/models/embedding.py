"""From tokens to vectors and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F


class Embedding(nn.Module):
    """A table of vectors: (batch, tokens) integers to (batch, tokens, width)."""

    def __init__(self, entries: int, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(entries, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        x = F.embedding(indices, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class Head(nn.Module):
    """Logits from hidden states: (..., width) to (..., vocabulary).

    Args:
        width: of the hidden states.
        vocabulary: number of logits.
        soft_cap: logits l become soft_cap * tanh(l / soft_cap).
        tied: an embedding whose weights serve here too; the head then has no parameters of its own.

    Attributes:
        group: ranks that share the vocabulary; None: all of it is here.
        first_row: of the vocabulary that is here.
    """

    def __init__(self, width: int, vocabulary: int, soft_cap: float | None = None, tied: Embedding | None = None):
        super().__init__()
        self.vocabulary, self.soft_cap = vocabulary, soft_cap
        self.group: ProcessGroup | None = None
        self.first_row = 0
        # In a tuple, so that the embedding is not registered a second time: each weight has one name in a state dict.
        self.tied = () if tied is None else (tied,)
        if tied is None:
            self.weight = nn.Parameter(torch.empty(vocabulary, width))
            nn.init.normal_(self.weight, std=0.02)

    @property
    def rows(self) -> Tensor:
        """(vocabulary, width): the head's own weight, or the embedding's."""
        return self.tied[0].weight if self.tied else self.weight

    def forward(self, hidden: Tensor, read: Callable[[Tensor, Tensor, Head], Any] | None = None) -> Any:
        """The logits, or what ``read`` makes of the hidden states, the weight (rows here, width) and this head, so that
        the logits need never exist whole."""
        if read is not None:
            return read(hidden, self.rows, self)
        return self.capped(F.linear(hidden, self.rows))

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on.

    Applied to the embeddings, it keeps the whole residual stream in that dtype. Else every layer would read and write
    the stream in float32 and cast it once for each of its projections.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

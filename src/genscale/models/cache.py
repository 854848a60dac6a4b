"""The keys and values of tokens already seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer.

    Rows grow together: each forward appends the same number of columns to all of them. Prompts of different length
    may be padded on the *left*: row i's real tokens are then the columns from ``start[i]`` on, and their positions
    count from there. Padding may hold any token; no real token attends to it.

        cache = KeyValueCache(start=longest - lengths)
        logits = network(padded_prompts, cache=cache)[:, -1]
        logits = network(next_tokens[:, None], cache=cache)[:, -1]     # as often as wished

    Args:
        capacity: most columns; memory for all of them is taken at the first forward, so that its address and shape
            never change. By default it is taken as needed, twice as much each time.
        start: (batch,) int64, padding columns at the left of each row; by default none.
    """

    def __init__(self, capacity: int | None = None, start: Tensor | None = None):
        self.capacity, self.start = capacity, start
        self.length = 0
        """Columns filled, padding included; the same for all rows."""
        self._layers: dict[int, Tensor] = {}  # each (2, batch, heads, room, head_width): keys, values

    @property
    def lengths(self) -> Tensor | int:
        """(batch,) real tokens in each row, or one number for all rows where there is no padding."""
        return self.length if self.start is None else (self.length - self.start).clamp(min=0)

    def positions(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """(tokens,) or (batch, tokens): the positions of the next ``tokens`` columns; padding is at position 0."""
        columns = torch.arange(self.length, self.length + tokens, device=device)
        return columns if self.start is None else (columns - self.start[:, None]).clamp(min=0)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, (batch, heads, tokens, head_width), and return all of its own."""
        end = self.length + keys.shape[2]
        if self.capacity is not None and end > self.capacity:
            raise ValueError(f"the key-value cache has room for {self.capacity} tokens, not {end}")
        held = self._layers.get(layer)
        if held is None or held.shape[3] < end:
            room = self.capacity or max(64, 2 * end)
            larger = keys.new_zeros((2, *keys.shape[:2], room, keys.shape[3]))
            if held is not None:
                larger[:, :, :, : self.length] = held[:, :, :, : self.length]
            held = self._layers[layer] = larger
        held[0, :, :, self.length : end] = keys
        held[1, :, :, self.length : end] = values
        return held[0, :, :, :end], held[1, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count columns that every layer has appended."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget the columns from ``length`` on, as when guessed tokens are rejected."""
        self.length = min(self.length, length)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order: rows that have ended need no more work."""
        self._layers = {layer: held[:, rows] for layer, held in self._layers.items()}
        self.start = None if self.start is None else self.start[rows]

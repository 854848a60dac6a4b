"""Rotary position embedding for images: half of each head turns by the row, half by the column (Heo et al. 2024)."""

from __future__ import annotations

import torch
from torch import nn

from genscale.models.rotary import Rotation


class GridRotary(nn.Module):
    """From the rows and columns of a grid to rotations for :func:`genscale.models.rotary.rotate`.

    Scores then depend on how many rows and columns lie between a query and a key, and on nothing else of their places.
    It has neither parameters nor buffers, and serves grids of any size.

    Args:
        head_width: a multiple of 4.
        base: the slowest pair turns once in about 2 pi x base cells. Grids are short, so less than in text.
    """

    def __init__(self, head_width: int, base: float = 100.0):
        super().__init__()
        self.head_width, self.base = head_width, base

    def forward(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """Rotations of rows x columns tokens, row by row, computed in float32 and given in ``dtype``."""
        exponents = torch.arange(0, self.head_width, 4, device=device, dtype=torch.float32) / self.head_width
        frequencies = 1.0 / self.base**exponents  # (head_width / 4,) radians per cell
        row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
        column = torch.arange(columns, device=device).expand(rows, columns)
        # (tokens, head_width / 2): pair i of a head is (i, i + head_width / 2)
        angles = (torch.stack((row, column), -1).flatten(0, 1)[..., None] * frequencies).flatten(1)
        cosines, sines = angles.cos(), angles.sin()
        shape = (1, 1, rows * columns, self.head_width)
        return (
            torch.cat((cosines, cosines), -1).view(shape).to(dtype),
            torch.cat((-sines, sines), -1).view(shape).to(dtype),
        )

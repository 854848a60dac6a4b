"""Twice the resolution by a learned convolution, as UNets do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Upsample(nn.Module):
    """Twice the height and width: each pixel four times, then a 3 x 3 convolution.

    Computed before pixels are repeated: an output pixel sees 2 x 2 different ones, so each of the four that come from
    one pixel has a 2 x 2 kernel of its own, sums of the 3 x 3's. 4/9 of the operations, and the same numbers.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels, 2 height, 2 width)."""
        channels, height, width = x.shape[1:]
        weight = _of_halves(self.convolution.weight)  # (2, 2, channels, channels, 2, 2)
        y = F.conv2d(x, weight.flatten(0, 2), self.convolution.get_parameter("bias").repeat(4), padding=1)
        y = y.unflatten(1, (2, 2, channels))  # (batch, 2, 2, channels, height + 1, width + 1)
        rows = [
            torch.stack((y[:, i, 0, :, i : i + height, :width], y[:, i, 1, :, i : i + height, 1:]), dim=-1).flatten(-2)
            for i in (0, 1)
        ]
        return torch.stack(rows, dim=3).flatten(2, 3)


def _of_halves(weight: Tensor) -> Tensor:
    """(outputs, inputs, 3, 3) to (2, 2, outputs, inputs, 2, 2): the kernel of each pixel in a repeated 2 x 2."""
    above, middle, below = weight.unbind(2)
    rows = torch.stack((torch.stack((above, middle + below), 2), torch.stack((above + middle, below), 2)))
    left, middle, right = rows.unbind(4)  # each (2, outputs, inputs, 2)
    return torch.stack((torch.stack((left, middle + right), 4), torch.stack((left + middle, right), 4)), 1)

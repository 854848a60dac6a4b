"""Fewer bytes for what copies of a model exchange."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 256


def packed(flat: Tensor, bits: int) -> Tensor:
    """As bytes: bfloat16 for 16 bits; for 8 and 4, integers from -m to m with a float32 scale for each block."""
    if bits == 16:
        return flat.to(torch.bfloat16).view(torch.uint8)
    largest = 2 ** (bits - 1) - 1
    blocks = functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / largest
    codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8).view(torch.uint8)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return torch.cat([scales.view(torch.uint8).flatten(), codes.flatten()])


def unpacked(piece: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` float32 numbers that :func:`packed` made into bytes."""
    if bits == 16:
        return piece.view(torch.bfloat16).float()
    blocks = -(-count // _BLOCK)
    scales, codes = piece[: 4 * blocks].view(torch.float32), piece[4 * blocks :].view(blocks, -1)
    if bits == 4:
        low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4  # >> keeps the sign
        codes = torch.stack([low, high], -1).flatten(1)
    return (codes.view(torch.int8).float() * scales[:, None]).flatten()[:count]

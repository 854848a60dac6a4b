"""FlexAttention: on an accelerator it skips the blocks of keys that a mask hides, and fuses the soft cap.

It has no backward on a CPU (torch 2.13), where models/blockwise.py takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from genscale.models.mask import AttentionMask


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex_attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, scale: float, soft_cap: float | None
) -> Tensor:
    """Attention of (batch, heads, queries, head_width) over keys and values with as many or fewer heads."""
    attend = flex_attention if torch.compiler.is_compiling() or queries.device.type == "cpu" else _compiled()
    return attend(
        queries,
        keys,
        values,
        score_mod=None if soft_cap is None else _soft_cap(soft_cap),
        block_mask=None if mask.all_visible else _block_mask(mask, queries),
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


@cache
def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def soft_cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft_cap


def _block_mask(mask: AttentionMask, queries: Tensor) -> BlockMask:
    if mask.flex_mask is None:
        batch = None if mask.documents is None and mask.start is None else queries.shape[0]
        mask.flex_mask = create_block_mask(
            _mask_function(mask), batch, None, mask.queries, mask.keys, device=queries.device
        )
    assert isinstance(mask.flex_mask, BlockMask)
    return mask.flex_mask


def _mask_function(mask: AttentionMask) -> Callable[..., Tensor]:
    """The rule of AttentionMask.visible for one query and one key."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        column = query + mask.offset
        seen = column >= key if mask.causal else key >= 0
        if mask.window is not None:
            seen = seen & ((column - key).abs() < mask.window)
        if mask.documents is not None:
            seen = seen & (mask.documents[batch, column] == mask.documents[batch, key])
        if mask.start is not None:
            seen = (seen & (key >= mask.start[batch])) | (column == key)
        return seen

    return visible

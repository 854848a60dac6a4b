"""Attention over heads, and the choice of its kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.models.blockwise import blocks_pay, blockwise_attention
from genscale.models.cache import KeyValueCache
from genscale.models.mask import AttentionMask
from genscale.models.normalisation import Norm
from genscale.models.rotary import Rotation, rotate


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, with grouped queries (Ainslie et al. 2023).

    Args:
        width: of the input and the output.
        heads: query heads.
        key_value_heads: key and value heads, shared by consecutive groups of query heads; by default ``heads``.
        head_width: by default ``width / heads``.
        bias: on the output projection.
        query_key_value_bias: on the other three.
        query_key_norm: RMSNorm on each head's queries and keys before they are rotated (Henry et al. 2020).
        norm_epsilon: of that norm.
        query_scale: scores are divided by the root of this; by default the head width.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap).
        dropout: rate on the probabilities while training.

    Attributes:
        kernel: from queries, keys and values to what they come to: :func:`attend`, or one that knows of other
            processes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        bias: bool = False,
        query_key_value_bias: bool = False,
        query_key_norm: bool = False,
        norm_epsilon: float = 1e-5,
        query_scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads or heads
        self.head_width = head_width or width // heads
        self.scale = 1 / math.sqrt(query_scale or self.head_width)
        self.soft_cap, self.dropout = soft_cap, dropout
        # Three matrices, not one: each shards by its own heads, and Muon orthogonalises each by itself.
        self.query = nn.Linear(width, heads * self.head_width, bias=query_key_value_bias)
        self.key = nn.Linear(width, self.key_value_heads * self.head_width, bias=query_key_value_bias)
        self.value = nn.Linear(width, self.key_value_heads * self.head_width, bias=query_key_value_bias)
        self.query_norm = Norm(self.head_width, "rms", norm_epsilon) if query_key_norm else None
        self.key_norm = Norm(self.head_width, "rms", norm_epsilon) if query_key_norm else None
        self.output = nn.Linear(heads * self.head_width, width, bias=bias)
        self.kernel: Callable[..., Tensor] = attend

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask | None = None,
        rotation: Rotation | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """From (batch, tokens, width) to the same.

        Args:
            x: the sequence.
            mask: which keys a query sees; None: all.
            rotation: of queries and keys, from ``Rotary``; None: they know no order.
            cache: keys and values of earlier tokens, to which this layer's, number ``layer``, are appended.
        """
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, -1, self.head_width)  # heads may be fewer here when they are sharded
        k = self.key(x).view(batch, tokens, -1, self.head_width)
        v = self.value(x).view(batch, tokens, -1, self.head_width).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (batch, heads, tokens, head_width)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if mask is None:
            mask = AttentionMask(q.shape[2], k.shape[2], causal=False, device=x.device)
        y = self.kernel(q, k, v, mask, self.scale, self.soft_cap, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).reshape(batch, tokens, -1))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: AttentionMask,
    scale: float,
    soft_cap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the kernel that suits the device, the mask and the options; all give the same numbers.

    Args:
        queries: (batch, heads, queries, head_width).
        keys, values: (batch, key_value_heads, keys, head_width).

    Returns:
        (batch, heads, queries, head_width).
    """
    regular = mask.triangular or mask.all_visible
    uneven = soft_cap is not None or not regular
    if uneven and queries.device.type != "cpu" and not dropout and queries.shape[2] > 1 and _fused_allowed():
        from genscale.models.flex import flex_attend

        return flex_attend(queries, keys, values, mask, scale, soft_cap)
    if soft_cap is not None:
        return capped_attention(queries, keys, values, mask, scale, soft_cap, dropout)
    if _fused_allowed() and blocks_pay(queries, keys, mask):
        return blockwise_attention(queries, keys, values, mask, scale, dropout)
    return F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if regular else mask.visible(),
        dropout_p=dropout,
        is_causal=mask.triangular and not mask.all_visible,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )


def _fused_allowed() -> bool:
    """False inside ``sdpa_kernel(SDPBackend.MATH)``, which asks for kernels that can be differentiated twice."""
    # The switch is global, whatever its name says; the compiler, which cannot read it, has no double backward anyway.
    return torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: AttentionMask, scale: float, cap: float, dropout: float
) -> Tensor:
    """Attention with soft-capped scores, written out in matrix products (Gemma 2, section 2)."""
    groups = queries.shape[1] // keys.shape[1]
    q = (queries * scale).unflatten(1, (-1, groups))  # (batch, key_value_heads, groups, queries, head_width)
    k, v = keys.unsqueeze(2), values.unsqueeze(2)
    scores = cap * torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / cap)
    if not mask.all_visible:
        scores = scores + mask.bias(scores.dtype).unsqueeze(2)
    probabilities = F.dropout(torch.softmax(scores, -1), dropout, training=dropout > 0)
    return torch.matmul(probabilities, v).flatten(1, 2)

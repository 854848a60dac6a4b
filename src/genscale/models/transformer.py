"""The decoder-only transformer: block, then model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.models.blocks import Around, Blocks
from genscale.models.layers import (
    Attention,
    AttentionMask,
    Embedding,
    Head,
    KeyValueCache,
    Norm,
    Rotary,
    Rotation,
    in_compute_dtype,
)
from genscale.models.mixture import Experts, feed_forward_of
from genscale.recipe.model import TransformerModel

_BRANCH_OUTPUTS = (
    "attention.output.weight",
    "feed_forward.down.weight",
    "feed_forward.experts.down",
    "feed_forward.shared.down.weight",
)
"""The last matrix of each residual branch."""


def norm_of(shape: TransformerModel) -> Norm:
    return Norm(shape.width, shape.norm, shape.norm_epsilon, shape.norm_scale, shape.norm_centred, shape.bias)


class Block(nn.Module):
    """Attention, then feed-forward, each normed before it (and after, with ``post_norm``) and added to its input."""

    def __init__(self, shape: TransformerModel, layer: int = 0):
        super().__init__()
        self.attention_norm = norm_of(shape)
        self.attention = Attention(
            shape.width,
            shape.heads,
            shape.key_value_heads,
            shape.width_of_head,
            bias=shape.bias,
            query_key_value_bias=shape.query_key_value_bias,
            query_key_norm=shape.query_key_norm,
            norm_epsilon=shape.norm_epsilon,
            query_scale=shape.query_scale,
            soft_cap=shape.attention_soft_cap,
            dropout=shape.dropout,
        )
        self.attention_post_norm = norm_of(shape) if shape.post_norm else None
        self.feed_forward_norm = norm_of(shape)
        self.feed_forward = feed_forward_of(shape, layer, shape.bias)
        self.feed_forward_post_norm = norm_of(shape) if shape.post_norm else None
        self.dropout = shape.dropout

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        rotation: Rotation | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        y = self.attention(self.attention_norm(x), mask, rotation, cache, layer)
        if self.attention_post_norm is not None:
            y = self.attention_post_norm(y)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.feed_forward(self.feed_forward_norm(x))
        if self.feed_forward_post_norm is not None:
            y = self.feed_forward_post_norm(y)
        return x + F.dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """Logits for each token of a sequence.

    Args:
        shape: the recipe's ``model``.
        vocabulary: number of tokens, special ones included.
        causal: whether a token sees only those before it; masked diffusion sees both ways.
    """

    def __init__(self, shape: TransformerModel, vocabulary: int, causal: bool = True):
        super().__init__()
        self.shape, self.vocabulary, self.causal = shape, vocabulary, causal
        self.embedding = Embedding(vocabulary, shape.width, shape.embedding_scale)
        self.position_embedding = Embedding(shape.context, shape.width) if shape.positions == "learned" else None
        self.rotary = None
        if shape.positions == "rotary":
            self.rotary = Rotary(shape.width_of_head, shape.rotary_base, shape.rotary_scaling)
        self.blocks = Blocks(Block(shape, layer) for layer in range(shape.layers))
        self.norm = norm_of(shape)
        self.head = Head(shape.width, vocabulary, shape.logit_soft_cap, self.embedding if shape.tied_head else None)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        logits: bool = True,
    ) -> Tensor:
        """Logits, (batch, tokens, vocabulary), or without ``logits`` what :meth:`hidden` gives, whose arguments the
        others are."""
        hidden = self.hidden(tokens, documents, cache, positions)
        return self.head(hidden) if logits else hidden

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The head's input, (batch, tokens, width), so that a loss may take the logits piece by piece.

        Args:
            tokens: (batch, tokens) int64.
            documents: (batch, tokens) integers; attention then stays among tokens of an equal number.
            cache: keys and values of earlier tokens; those of ``tokens`` are appended to it.
            positions: (tokens,) or (batch, tokens) int64; by default counted from 0, or on from the cache.
        """
        inputs: dict[str, Any] = {"tokens": tokens, "documents": documents, "cache": cache, "positions": positions}
        x, _ = self.enter(**inputs)
        x = self.norm(self.blocks(x, None, self.around(x.dtype, **inputs)))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    # In parts, for pipelines: see genscale.models.blocks.Stacked

    first = ("embedding", "position_embedding")
    last = ("norm", "head")
    conditioned = False

    def enter(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """What enters the blocks, (batch, tokens, width); the arguments are those of :meth:`hidden`."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(self._positions(tokens, cache, positions))
        return F.dropout(in_compute_dtype(x), self.shape.dropout, self.training), None

    def around(
        self,
        dtype: torch.dtype,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Around:
        """What the blocks are told beside it; the arguments are those of :meth:`hidden`."""
        rotation = None if self.rotary is None else self.rotary(self._positions(tokens, cache, positions), dtype)
        masks = self._masks(tokens, documents, cache)
        return Around([masks[self.window_of(layer)] for layer in range(self.shape.layers)], rotation, cache)

    def leave(self, x: Tensor, condition: None, **inputs: Tensor | None) -> Tensor:
        """The head's input again, of what the blocks gave."""
        return self.norm(x)

    @staticmethod
    def _positions(tokens: Tensor, cache: KeyValueCache | None, positions: Tensor | None) -> Tensor:
        if positions is not None:
            return positions
        return (cache or KeyValueCache()).positions(tokens.shape[1], tokens.device)

    def initial_std(self, name: str, size: torch.Size) -> float:
        """How the parameter ``name`` begins: normal with this standard deviation around 0.

        The branches' outputs are divided by sqrt(2 x layers), so that the residual stream's variance does not grow with
        depth (Radford et al. 2019, section 2.3), or start at zero.
        """
        if name.endswith("bias"):
            return 0.0
        if not name.endswith(_BRANCH_OUTPUTS):
            return self.shape.initial_std
        return 0.0 if self.shape.zero_output_layers else self.shape.initial_std / math.sqrt(2 * self.shape.layers)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where attention reaches everywhere."""
        which = self.shape.sliding_window_layers
        return self.shape.sliding_window if which == "all" or (which == "even") == (layer % 2 == 0) else None

    def _masks(
        self, tokens: Tensor, documents: Tensor | None, cache: KeyValueCache | None
    ) -> dict[int | None, AttentionMask]:
        """One mask for each distinct window, shared by the layers that have it."""
        if cache is not None and (documents is not None or not self.causal):
            raise ValueError("a key-value cache serves causal attention over whole rows only")
        count = tokens.shape[1]
        columns = count if cache is None else cache.length + count
        start = None if cache is None else cache.start
        windows = {self.window_of(layer) for layer in range(self.shape.layers)}
        return {
            window: AttentionMask(count, columns, self.causal, window, documents, start, tokens.device)
            for window in windows
        }

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one token's forward and backward, without recomputation.

        Six for each weight of a matrix product (two forward, four backward), and for attention 12 x heads x head
        width for each key in reach. By convention (Chowdhery et al. 2022, PaLM, appendix B) keys that causality hides
        count; keys outside a sliding window do not.
        """
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        matrices += self.vocabulary * self.shape.width  # the head, tied or not
        matrices += sum(
            round(stack.numel() * module.share_active)
            for module in self.modules()
            if isinstance(module, Experts)
            for stack in module.parameters()
        )
        reach = sum(min(context, self.window_of(layer) or context) for layer in range(self.shape.layers))
        return 6.0 * matrices + 12.0 * self.shape.heads * self.shape.width_of_head * reach

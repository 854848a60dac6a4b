"""The decoder-only transformer: block, then model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from genscale.models.layers import (
    Attention,
    AttentionMask,
    Embedding,
    FeedForward,
    Head,
    KeyValueCache,
    Norm,
    Rotary,
    Rotation,
    in_compute_dtype,
)
from genscale.recipe.model import TransformerModel

_BRANCH_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")
"""The last matrix of each residual branch."""


def norm_of(shape: TransformerModel) -> Norm:
    return Norm(shape.width, shape.norm, shape.norm_epsilon, shape.norm_scale, shape.norm_centred, shape.bias)


class Block(nn.Module):
    """Attention, then feed-forward, each normed before it (and after, with ``post_norm``) and added to its input."""

    def __init__(self, shape: TransformerModel):
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
        self.feed_forward = FeedForward(shape.width, shape.width_of_hidden, shape.feed_forward, shape.bias)
        self.feed_forward_post_norm = norm_of(shape) if shape.post_norm else None
        self.dropout = shape.dropout

    def forward(
        self, x: Tensor, mask: AttentionMask, rotation: Rotation | None, cache: KeyValueCache | None, layer: int
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

    Attributes:
        recompute: recompute each block in the backward instead of keeping its activations.
    """

    def __init__(self, shape: TransformerModel, vocabulary: int, causal: bool = True):
        super().__init__()
        self.shape, self.vocabulary, self.causal = shape, vocabulary, causal
        self.recompute = False
        self.embedding = Embedding(vocabulary, shape.width, shape.embedding_scale)
        self.position_embedding = Embedding(shape.context, shape.width) if shape.positions == "learned" else None
        self.rotary = None
        if shape.positions == "rotary":
            self.rotary = Rotary(shape.width_of_head, shape.rotary_base, shape.rotary_scaling)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm_of(shape)
        self.head = Head(shape.width, vocabulary, shape.logit_soft_cap, self.embedding if shape.tied_head else None)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits, (batch, tokens, vocabulary); the arguments are those of :meth:`hidden`."""
        return self.head(self.hidden(tokens, documents, cache, positions))

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
        count = tokens.shape[1]
        if positions is None:
            positions = (cache or KeyValueCache()).positions(count, tokens.device)
        x = self.embedding(tokens)  # (batch, tokens, width)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        x = F.dropout(in_compute_dtype(x), self.shape.dropout, self.training)
        rotation = None if self.rotary is None else self.rotary(positions, x.dtype)
        masks = self._masks(tokens, documents, cache)
        recompute = self.recompute and self.training and cache is None and is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            mask = masks[self.window_of(layer)]
            if recompute:
                x = checkpoint(block, x, mask, rotation, None, layer, use_reentrant=False)
            else:
                x = block(x, mask, rotation, cache, layer)
        if cache is not None:
            cache.advance(count)
        return self.norm(x)

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
        reach = sum(min(context, self.window_of(layer) or context) for layer in range(self.shape.layers))
        return 6.0 * matrices + 12.0 * self.shape.heads * self.shape.width_of_head * reach

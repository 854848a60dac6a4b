"""The recipe's ``model``: the shape of the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genscale.recipe.base import Part
from genscale.recipe.image_model import DCGANModel, DiffusionTransformerModel, GANModel, UNetModel
from genscale.recipe.mixture import Mixture


class RotaryScaling(Part):
    """Llama 3.1's stretching of rotary frequencies for contexts longer than were trained."""

    factor: float = Field(gt=0)
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


class TransformerModel(Part):
    """A transformer. Its defaults are today's usual choice: pre-norm RMSNorm, rotary positions, SwiGLU, no biases."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=384, ge=1)
    heads: int = Field(default=6, ge=1)
    key_value_heads: int | None = Field(default=None, ge=1)
    """Grouped-query attention: fewer key and value heads; by default as many as ``heads``."""
    head_width: int | None = Field(default=None, ge=1)
    """By default ``width / heads``."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layer; by default 4 x width, or 8/3 x width rounded up to 64 when gated."""
    feed_forward: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = Field(default=1e-5, gt=0)
    norm_scale: bool = True
    """Whether norms have a learned scale."""
    norm_centred: bool = False
    """The learned scale is stored as its difference from one (Gemma)."""
    post_norm: bool = False
    """Norm each branch's output as well (Gemma 2)."""
    query_key_norm: bool = False
    """RMSNorm on each head's queries and keys (Qwen 3)."""
    mixture: Mixture | None = None
    """Experts in place of the feed-forward layers, of which each token uses a few."""
    bias: bool = False
    """Biases in the feed-forward and attention output layers and in LayerNorm (GPT-2)."""
    query_key_value_bias: bool = False
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rotary_base: float = Field(default=10_000.0, gt=0)
    rotary_scaling: RotaryScaling | None = None
    context: int = Field(default=256, ge=1)
    """Tokens that the network sees at once."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Attention reaches back at most this many tokens, itself included."""
    sliding_window_layers: Literal["all", "even", "odd"] = "all"
    """Which layers the window applies to, counting from 0 (Gemma 2: even)."""
    query_scale: float | None = Field(default=None, gt=0)
    """Queries are divided by the root of this; by default the head width."""
    attention_soft_cap: float | None = Field(default=None, gt=0)
    """Attention scores s become cap * tanh(s / cap) (Gemma 2)."""
    logit_soft_cap: float | None = Field(default=None, gt=0)
    embedding_scale: float = Field(default=1.0, gt=0)
    """Token embeddings are multiplied by this (Gemma: the root of the width)."""
    tied_head: bool = True
    """Whether the output head shares the embedding's weights."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    within_documents: bool = False
    """Keep attention inside each document of a packed window."""
    initial_std: float = Field(default=0.02, gt=0)
    zero_output_layers: bool = False
    """Start each branch's output projection at zero instead of initial_std / sqrt(2 x layers)."""

    @model_validator(mode="after")
    def _fits(self) -> TransformerModel:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width}), or head_width be given")
        if self.key_value_heads is not None and self.heads % self.key_value_heads:
            raise ValueError(f"key_value_heads ({self.key_value_heads}) must divide heads ({self.heads})")
        if self.mixture is not None and self.mixture.from_layer >= self.layers:
            raise ValueError(f"mixture.from_layer ({self.mixture.from_layer}) is not one of {self.layers} layers")
        if self.positions == "rotary" and self.width_of_head % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.width_of_head}")
        return self

    @property
    def width_of_head(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def gated(self) -> bool:
        return self.feed_forward in ("swiglu", "geglu")

    @property
    def width_of_hidden(self) -> int:
        if self.hidden:
            return self.hidden
        return -(-8 * self.width // 3 // 64) * 64 if self.gated else 4 * self.width


Model = Annotated[
    TransformerModel | DiffusionTransformerModel | UNetModel | GANModel | DCGANModel, Field(discriminator="kind")
]

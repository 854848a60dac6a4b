"""The recipe's ``model`` for images: networks that denoise, and pairs that play against each other.

Resolution, channels, classes and captions come from the data, never from here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from genscale.recipe.base import Part
from genscale.recipe.mixture import Mixture


class TextEncoder(Part):
    """What turns a caption into vectors: a small transformer that is trained along."""

    layers: int = Field(default=2, ge=1)
    width: int = Field(default=128, ge=1)
    heads: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> TextEncoder:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class DiffusionTransformerModel(Part):
    """A diffusion transformer (Peebles and Xie 2023) of the language model's own layers: S, B, L, XL are 12 x 384, 12 x
    768, 24 x 1024, 28 x 1152 with 6, 12, 16, 16 heads."""

    kind: Literal["diffusion_transformer"] = "diffusion_transformer"
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=192, ge=1)
    heads: int = Field(default=3, ge=1)
    patch: int = Field(default=2, ge=1)
    """Pixels, or latent cells, on each side of a token."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layer; by default 4 x width, or 8/3 x width rounded up to 64 when gated."""
    feed_forward: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"] = "gelu_tanh"
    mixture: Mixture | None = None
    """Experts in place of the feed-forward layers, of which each token uses a few."""
    positions: Literal["rotary", "learned"] = "rotary"
    """``rotary`` turns half of each head by the row and half by the column."""
    query_key_norm: bool = True
    dropout: float = Field(default=0.0, ge=0, lt=1)
    text_encoder: TextEncoder = TextEncoder()
    """Used where the condition is a caption."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionTransformerModel:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.mixture is not None and self.mixture.from_layer >= self.layers:
            raise ValueError(f"mixture.from_layer ({self.mixture.from_layer}) is not one of {self.layers} layers")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"rotary positions in two directions need a head width that 4 divides, not {self.width // self.heads}"
            )
        return self

    @property
    def width_of_head(self) -> int:
        return self.width // self.heads

    @property
    def width_of_hidden(self) -> int:
        if self.hidden:
            return self.hidden
        gated = self.feed_forward in ("swiglu", "geglu")
        return -(-8 * self.width // 3 // 64) * 64 if gated else 4 * self.width


class UNetModel(Part):
    """A UNet with residual blocks and attention (Ho et al. 2020; Dhariwal and Nichol 2021)."""

    kind: Literal["unet"] = "unet"
    width: int = Field(default=64, ge=1)
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = Field(default=(1, 2, 2), min_length=1)
    """Channels of each level, in widths; each level has half of the resolution of the one before."""
    blocks: int = Field(default=2, ge=1)
    """Residual blocks in each level, on the way down."""
    attention: tuple[int, ...] = (2,)
    """The levels, from 0, that have attention; the middle always has."""
    head_width: int = Field(default=64, ge=1)
    """Of attention; 8, the usual default elsewhere, is 1.5 times slower on a CPU."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    text_encoder: TextEncoder = TextEncoder()
    """Used where the condition is a caption."""

    @model_validator(mode="after")
    def _fits(self) -> UNetModel:
        levels = len(self.multipliers)
        if min(self.multipliers) < 1:
            raise ValueError(f"multipliers: each level has at least 1 width, not {min(self.multipliers)}")
        for level in self.attention:
            if not 0 <= level < levels:
                raise ValueError(
                    f"attention names level {level}, but multipliers has {levels} levels, 0 to {levels - 1}"
                )
            if self.width * self.multipliers[level] % self.head_width:
                raise ValueError(
                    f"head_width ({self.head_width}) must divide the channels of level {level}, "
                    f"{self.width * self.multipliers[level]}"
                )
        if self.width * self.multipliers[-1] % self.head_width:
            raise ValueError(
                f"head_width ({self.head_width}) must divide the channels of the middle, "
                f"{self.width * self.multipliers[-1]}"
            )
        return self


class GANModel(Part):
    """A generator and a discriminator of mirrored residual blocks without normalisation (R3GAN, Huang et al. 2024)."""

    kind: Literal["gan"] = "gan"
    latent: int = Field(default=64, ge=1)
    """Numbers that an image is drawn from."""
    generator: tuple[int, ...] = Field(default=(256, 128, 64), min_length=1)
    """Channels of the generator's levels, from the coarsest; each doubles the resolution."""
    discriminator: tuple[int, ...] = Field(default=(64, 128, 256), min_length=1)
    """Channels of the discriminator's levels, from the finest; each halves the resolution."""
    blocks: int = Field(default=1, ge=1)
    """Residual blocks in each level."""
    expansion: int = Field(default=2, ge=1)
    """Width of a block's middle, in widths of its level."""
    group_width: int | None = Field(default=16, ge=1)
    """Channels in each group of a block's 3 x 3 convolution; null: one group."""
    embedding: int = Field(default=64, ge=1)
    """Width of a class's vector."""

    @model_validator(mode="after")
    def _groups_fit(self) -> GANModel:
        for name in ("generator", "discriminator"):
            for width in getattr(self, name):
                if width < 1:
                    raise ValueError(f"{name}: a level has at least 1 channel, not {width}")
                if self.group_width and width * self.expansion % self.group_width:
                    raise ValueError(
                        f"group_width ({self.group_width}) must divide {width} channels of {name} x expansion "
                        f"({self.expansion}); null makes one group"
                    )
        return self


class DCGANModel(Part):
    """A small generator and discriminator of strided convolutions (DCGAN, Radford et al. 2016): for small images and
    small machines."""

    kind: Literal["dcgan"] = "dcgan"
    latent: int = Field(default=64, ge=1)
    """Numbers that an image is drawn from."""
    generator: tuple[PositiveInt, ...] = Field(default=(64, 32), min_length=1)
    """Channels before each doubling of the resolution, from the coarsest."""
    discriminator: tuple[PositiveInt, ...] = Field(default=(32, 64), min_length=1)
    """Channels after each halving of the resolution, from the finest."""
    embedding: int = Field(default=64, ge=1)
    """Width of a class's vector."""

"""A small generator and discriminator of strided convolutions, for laptops: the pair of DCGAN.

As in Radford et al. 2016 (https://arxiv.org/abs/1511.06434), every level doubles or halves the resolution by one 4 x 4
convolution, but no statistic of the batch is used: the generator normalises each image by itself, and the discriminator
nothing. At 28 pixels an image costs a quarter of what it does in the residual pair, and is learned from sooner.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.gan import SLOPE, at_least_float32, coarsest, within_range
from genscale.recipe.image_model import DCGANModel

_CALM = 0.4
"""First weights, in units of those that keep the variance: a discriminator that begins flat lets the generator follow.
On Fashion-MNIST classes were drawn right in 94 of 100 images rather than 88 (docs/experiments.md)."""


class DCGANGenerator(nn.Module):
    """From latents to images.

    Args:
        shape: of the network.
        described: the images that it learns to draw.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: DCGANModel, described: ImageDescription, conditional: bool):
        super().__init__()
        widths = (*shape.generator, described.channels)
        self.side = coarsest(shape.generator, len(shape.generator), described.resolution, "generator")
        self.bounded = described.autoencoder is None
        self.embedding = nn.Embedding(len(described.classes) + 1, shape.embedding) if conditional else None
        told = shape.latent + (shape.embedding if conditional else 0)
        self.mix = nn.Linear(told, widths[0] * self.side**2)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in shape.generator)
        self.levels = nn.ModuleList(nn.ConvTranspose2d(*pair, 4, stride=2, padding=1) for pair in pairwise(widths))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, latent) standard normal and (batch,) int64 to (batch, channels, resolution, resolution) float32."""
        if self.embedding is not None:
            latents = torch.cat((latents, self.embedding(labels)), dim=1)
        x = self.mix(latents).unflatten(1, (-1, self.side, self.side))
        for norm, level in zip(self.norms, self.levels, strict=True):
            x = level(F.relu(norm(x)))
        return within_range(x, self.bounded)

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Standard deviation of the first values of the parameter ``name``, normal around 0."""
        if name == "embedding.weight":
            return 1.0
        if name.endswith("bias"):
            return 0.0
        if name == "mix.weight":
            return _CALM / math.sqrt(size[1])
        # Weights are (inputs, outputs, 4, 4); with a stride of 2, an output pixel sees 2 x 2 input pixels.
        return _CALM * math.sqrt(2 / (4 * size[0]))


class DCGANDiscriminator(nn.Module):
    """From images to logits, larger where an image looks real.

    Args:
        shape: of the network.
        described: the images that it judges.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: DCGANModel, described: ImageDescription, conditional: bool):
        super().__init__()
        widths = (described.channels, *shape.discriminator)
        side = coarsest(shape.discriminator, len(shape.discriminator), described.resolution, "discriminator")
        self.levels = nn.ModuleList(nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairwise(widths))
        self.mix = nn.Linear(widths[-1] * side**2, shape.embedding if conditional else 1)
        self.embedding = nn.Embedding(len(described.classes) + 1, shape.embedding) if conditional else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, channels, resolution, resolution) and (batch,) int64 to (batch,) float32."""
        x = images
        for level in self.levels:
            x = F.leaky_relu(level(x), SLOPE)
        x = at_least_float32(self.mix(x.flatten(1)))  # (batch, 1 or embedding)
        # The class's vector is what the features are projected on (Miyato and Koyama 2018).
        return x.squeeze(1) if self.embedding is None else (x * self.embedding(labels)).sum(dim=1)

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Standard deviation of the first values of the parameter ``name``, normal around 0."""
        if name.endswith("bias"):
            return 0.0
        if name == "embedding.weight":
            return 1 / math.sqrt(size[1])
        return _CALM * math.sqrt((1 if name == "mix.weight" else 2 / (1 + SLOPE**2)) / math.prod(size[1:]))

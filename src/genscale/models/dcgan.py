"""A small generator and discriminator of strided convolutions, for laptops: the pair of DCGAN.

As in Radford et al. 2016 (https://arxiv.org/abs/1511.06434), every level doubles or halves the resolution by one 4 x 4
convolution, but no statistic of the batch is used: the generator normalises each image by itself, and the discriminator
nothing. A step is cheap, since nothing but pixels is as large as the image.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.adversaries import SLOPE, Discriminator, Generator, coarsest
from genscale.recipe.image_model import DCGANModel

_CALM = 0.4
"""First weights, in units of those that keep the variance: a discriminator that begins flat lets the generator follow.
On Fashion-MNIST classes were drawn right in 94 of 100 images rather than 88 (docs/experiments.md)."""


class DCGANGenerator(Generator):
    """From latents to images, by strided convolutions.

    Args:
        shape: of the network.
        described: the images that it learns to draw.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: DCGANModel, described: ImageDescription, conditional: bool):
        super().__init__(described, conditional, shape.embedding)
        widths = (*shape.generator, described.channels)
        self.side = coarsest(shape.generator, len(shape.generator), described.resolution, "generator")
        self.mix = nn.Linear(shape.latent + self.told, widths[0] * self.side**2)
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in shape.generator)
        self.levels = nn.ModuleList(nn.ConvTranspose2d(*pair, 4, stride=2, padding=1) for pair in pairwise(widths))

    def draw(self, told: Tensor) -> Tensor:
        x = self.mix(told).unflatten(1, (-1, self.side, self.side))
        for norm, level in zip(self.norms, self.levels, strict=True):
            x = level(F.relu(norm(x)))
        return x

    def layer_std(self, name: str, size: torch.Size) -> float:
        if name.endswith("bias"):
            return 0.0
        if name == "mix.weight":
            return _CALM / math.sqrt(size[1])
        # Weights are (inputs, outputs, 4, 4); with a stride of 2, an output pixel sees 2 x 2 input pixels.
        return _CALM * math.sqrt(2 / (4 * size[0]))


class DCGANDiscriminator(Discriminator):
    """From images to logits, by strided convolutions.

    Args:
        shape: of the network.
        described: the images that it judges.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: DCGANModel, described: ImageDescription, conditional: bool):
        widths = (described.channels, *shape.discriminator)
        side = coarsest(shape.discriminator, len(shape.discriminator), described.resolution, "discriminator")
        super().__init__(described, conditional, shape.embedding, features=widths[-1] * side**2, bias=True)
        self.levels = nn.ModuleList(nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in pairwise(widths))

    def look(self, images: Tensor) -> Tensor:
        x = images
        for level in self.levels:
            x = F.leaky_relu(level(x), SLOPE)
        return x.flatten(1)

    def layer_std(self, name: str, size: torch.Size) -> float:
        if name.endswith("bias"):
            return 0.0
        return _CALM * math.sqrt((1 if name == "mix.weight" else 2 / (1 + SLOPE**2)) / math.prod(size[1:]))

"""A generator and a discriminator that mirror each other: residual blocks without normalisation.

The networks of R3GAN (Huang et al. 2024, https://arxiv.org/abs/2501.05441, section 3): inverted bottlenecks of a 1 x 1,
a grouped 3 x 3 and a 1 x 1 convolution; an image begins as a learned basis and ends against one; resampling is
bilinear. Started as in Fixup (Zhang et al. 2019): every block is first the identity, and the others keep the variance.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.adversaries import SLOPE, Discriminator, Generator, coarsest
from genscale.models.resampling import downsample, upsample
from genscale.recipe.image_model import GANModel

_GAIN = math.sqrt(2 / (1 + SLOPE**2))
"""Standard deviation of weights that make up for the activation (He et al. 2015), in units of 1 / sqrt(fan-in)."""


class ResidualGenerator(Generator):
    """From latents to images, by residual blocks.

    Args:
        shape: of the network.
        described: the images that it learns to draw.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: GANModel, described: ImageDescription, conditional: bool):
        super().__init__(described, conditional, shape.embedding)
        self.shape = shape
        widths = shape.generator
        side = coarsest(widths, len(widths) - 1, described.resolution, "generator")
        self.mix = nn.Linear(shape.latent + self.told, widths[0], bias=False)
        self.basis = nn.Parameter(torch.randn(widths[0], side, side))
        self.blocks = nn.ModuleList(_blocks(width, shape) for width in widths)
        self.transitions = nn.ModuleList(_transition(*pair) for pair in pairwise(widths))
        self.output = nn.Conv2d(widths[-1], described.channels, 1)

    def draw(self, told: Tensor) -> Tensor:
        x = self.mix(told)[:, :, None, None] * self.basis  # (batch, width, side, side)
        x = self.blocks[0](x)
        for transition, blocks in zip(self.transitions, self.blocks[1:], strict=True):
            x = blocks(upsample(transition(x)))
        return self.output(x)

    def layer_std(self, name: str, size: torch.Size) -> float:
        return 1.0 if name == "basis" else _initial_std(name, size, len(self.shape.generator) * self.shape.blocks)


class ResidualDiscriminator(Discriminator):
    """From images to logits, by residual blocks.

    Args:
        shape: of the network.
        described: the images that it judges.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(self, shape: GANModel, described: ImageDescription, conditional: bool):
        widths = shape.discriminator
        super().__init__(described, conditional, shape.embedding, features=widths[-1], bias=False)
        self.shape = shape
        side = coarsest(widths, len(widths) - 1, described.resolution, "discriminator")
        self.input = nn.Conv2d(described.channels, widths[0], 1)
        self.blocks = nn.ModuleList(_blocks(width, shape) for width in widths)
        self.transitions = nn.ModuleList(_transition(*pair) for pair in pairwise(widths))
        self.basis = nn.Parameter(torch.randn(widths[-1], side, side) / side)

    def look(self, images: Tensor) -> Tensor:
        x = self.input(images)
        for blocks, transition in zip(self.blocks, [*self.transitions, None], strict=True):
            x = blocks(x)
            if transition is not None:
                x = transition(downsample(x))
        return (x * self.basis).sum(dim=(2, 3))

    def layer_std(self, name: str, size: torch.Size) -> float:
        if name == "basis":
            return 1 / math.sqrt(size[1] * size[2])
        return _initial_std(name, size, len(self.shape.discriminator) * self.shape.blocks)


class ResidualBlock(nn.Module):
    """x plus a bottleneck turned inside out: ``expansion`` times as wide in its middle, which sees 3 x 3 pixels."""

    def __init__(self, width: int, expansion: int, group_width: int | None):
        super().__init__()
        middle = width * expansion
        self.widen = nn.Conv2d(width, middle, 1)
        self.look = nn.Conv2d(middle, middle, 3, padding=1, groups=middle // (group_width or middle))
        self.narrow = nn.Conv2d(middle, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        middle = F.leaky_relu(self.widen(x), SLOPE)
        return x + self.narrow(F.leaky_relu(self.look(middle), SLOPE))


def _blocks(width: int, shape: GANModel) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width, shape.expansion, shape.group_width) for _ in range(shape.blocks)))


def _transition(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()


def _initial_std(name: str, size: torch.Size, blocks: int) -> float:
    if name.endswith(("bias", "narrow.weight")):
        return 0.0
    std = 1 / math.sqrt(math.prod(size[1:]))
    # Fixup: a branch of m layers in a network of n blocks is scaled by n^(-1 / (2 m - 2)); here m = 3.
    return std * _GAIN * blocks**-0.25 if name.endswith(("widen.weight", "look.weight")) else std

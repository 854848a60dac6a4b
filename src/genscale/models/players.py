"""The pair of networks that the recipe's ``model`` names, for adversarial objectives."""

from __future__ import annotations

from torch import nn

from genscale.data.description import ImageDescription
from genscale.models.dcgan import DCGANDiscriminator, DCGANGenerator
from genscale.models.gan import Discriminator, Generator
from genscale.recipe.image_model import DCGANModel, GANModel


def build_generator(shape: GANModel | DCGANModel, described: ImageDescription, conditional: bool) -> nn.Module:
    """A network that is called as ``network(latents, labels=None)`` and gives images.

    Raises:
        UserError: the images' resolution is none that the shape can take.
    """
    if isinstance(shape, DCGANModel):
        return DCGANGenerator(shape, described, conditional)
    return Generator(shape, described, conditional)


def build_discriminator(shape: GANModel | DCGANModel, described: ImageDescription, conditional: bool) -> nn.Module:
    """A network that is called as ``network(images, labels=None)`` and gives a logit for each.

    Raises:
        UserError: the images' resolution is none that the shape can take.
    """
    if isinstance(shape, DCGANModel):
        return DCGANDiscriminator(shape, described, conditional)
    return Discriminator(shape, described, conditional)

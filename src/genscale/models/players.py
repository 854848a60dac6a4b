"""The pair of networks that the recipe's ``model`` names, for adversarial objectives."""

from __future__ import annotations

from typing import Literal

from genscale.data.description import ImageDescription
from genscale.models.adversaries import Discriminator, Generator
from genscale.models.dcgan import DCGANDiscriminator, DCGANGenerator
from genscale.models.gan import ResidualDiscriminator, ResidualGenerator
from genscale.recipe.image_model import DCGANModel, GANModel

Role = Literal["generator", "discriminator"]


def build_player(
    role: Role, shape: GANModel | DCGANModel, described: ImageDescription, conditional: bool
) -> Generator | Discriminator:
    """One of the two.

    Raises:
        UserError: the images' resolution is none that the shape can take.
    """
    draws = role == "generator"
    if isinstance(shape, DCGANModel):
        return (DCGANGenerator if draws else DCGANDiscriminator)(shape, described, conditional)
    return (ResidualGenerator if draws else ResidualDiscriminator)(shape, described, conditional)

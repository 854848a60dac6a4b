"""The network that the recipe's ``model`` names, for objectives that take noise out of images."""

from __future__ import annotations

from torch import nn

from genscale.data.description import ImageDescription
from genscale.models.conditioning import ConditionKind
from genscale.models.diffusion_transformer import DiffusionTransformer
from genscale.models.unet import UNet
from genscale.recipe.image_model import DiffusionTransformerModel, UNetModel


def build_denoiser(
    shape: DiffusionTransformerModel | UNetModel,
    described: ImageDescription,
    conditioning: ConditionKind,
    augmentation_width: int = 0,
) -> nn.Module:
    """A network that is called as ``network(x, noise_level, labels=None, captions=None, augmentation=None)``.

    Raises:
        UserError: the images' resolution is none that the shape can take.
    """
    if isinstance(shape, UNetModel):
        return UNet(shape, described, conditioning, augmentation_width)
    return DiffusionTransformer(shape, described, conditioning, augmentation_width)

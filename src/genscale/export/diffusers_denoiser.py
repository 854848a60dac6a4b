"""A trained denoiser as a component of diffusers.

This file travels with the weights (:mod:`genscale.export.diffusers`), so it imports only what travels with it.
(diffusers imports its classes late, where the type checker does not see them.)
"""

# mypy: disable-error-code="attr-defined,misc"

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from genscale.models.diffusion_transformer import DiffusionTransformer
from genscale.models.unet import UNet

NETWORKS = {"unet": UNet, "diffusion_transformer": DiffusionTransformer}


class Denoiser(ModelMixin, ConfigMixin):
    """A network that diffusers does not have, called as its ``UNet2DModel`` is.

    Args:
        kind: of network, a key of ``NETWORKS``.
        shape: of the network, as its recipe says.
        described: the images: ``channels``, ``resolution``, ``classes``, ``caption_vocabulary``, ``caption_tokens``.
        conditioning: ``"none"``, ``"class"`` or ``"text"``.
        augmentation_width: numbers that told the network of augmentation; zeros here, for images as they are.
        in_channels: of the images.
        sample_size: height and width of the images.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        shape: dict[str, Any],
        described: dict[str, Any],
        conditioning: str,
        augmentation_width: int,
        in_channels: int,
        sample_size: int,
    ):
        super().__init__()
        self.network = NETWORKS[kind](_as_object(shape), _as_object(described), conditioning, augmentation_width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        caption_tokens: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The answer to a noised image, like ``sample``.

        Args:
            sample: (batch, channels, height, width).
            timestep: 1,000 times the noise level, one number or (batch,).
            class_labels: (batch,) numbers of classes; the one after the last is none.
            caption_tokens: (batch, tokens), zeros at the end; all zeros is none.
        """
        level = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(len(sample)) / 1000
        changes = None
        if self.config.augmentation_width:
            changes = sample.new_zeros(len(sample), self.config.augmentation_width)
        answer = self.network(sample, level, labels=class_labels, captions=caption_tokens, augmentation=changes)
        return UNet2DOutput(sample=answer) if return_dict else (answer,)


def _as_object(value: Any) -> Any:
    """A mapping as an object with attributes, also inside; lists as tuples."""
    if isinstance(value, dict):
        return SimpleNamespace(**{name: _as_object(part) for name, part in value.items()})
    return tuple(_as_object(part) for part in value) if isinstance(value, list | tuple) else value

"""What is asked of an objective that draws images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from genscale.objectives.objective import Objective

SamplerName = Literal["auto", "euler", "heun", "ddim", "dpm_solver_2m", "ancestral"]


@dataclass(frozen=True)
class ImageRequest:
    """Images, or latents: one for each position of the ``Rng`` that is given beside it, which holds the seed and each
    image's number in it.

    What is drawn is (batch, channels, height, width) float32, about -1 to 1; whoever shows it clamps it.
    """

    labels: Tensor | None = None
    """(batch,) int64 classes, -1 for none; None: no image has one."""
    captions: Tensor | None = None
    """(batch, tokens) int64, all zeros for none; None: no image has one."""
    sampler: SamplerName = "auto"
    steps: int = 20
    guidance: float = 1.0
    """1 is none, more pushes away from the model without its condition, or from the ``guide``."""
    guidance_interval: tuple[float, float] | None = None
    """The part of the way from noise (0) to image (1) in which guidance acts; None: all of it."""
    guide: Objective | None = None
    """A weaker model of the same kind to push away from: autoguidance."""
    image: Tensor | None = None
    """(batch, channels, height, width) to start from, or to keep where ``mask`` is 0."""
    strength: float = 1.0
    """How far the image is noised, above 0: 1 is all the way, and none of it is left."""
    mask: Tensor | None = None
    """(batch, 1, height, width), 1 where the image is drawn anew, 0 where it is kept."""
    noise: Tensor | None = None
    """Diffusion: (batch, channels, height, width) standard normal noise to start from, in place of the seed's."""
    latents: Tensor | None = None
    """GAN: (batch, latent) to draw from, in place of the seed's."""
    truncation: float = 1.0
    """GAN: how far latents are from their mean; 0 gives the mean image, 1 what was learned."""

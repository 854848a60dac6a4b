"""The losses of two players and the penalties on their gradients, all of them one number for each image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

AdversarialKind = Literal["relativistic", "non_saturating", "hinge", "wasserstein"]


def discriminator_loss(kind: AdversarialKind, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises.

    ``relativistic``: softplus(fake - real), each real image paired with a generated one (Huang et al. 2024, equation
    2); ``non_saturating``: softplus(-real) + softplus(fake) (Goodfellow et al. 2014); ``hinge`` (Lim and Ye 2017);
    ``wasserstein``: fake - real (Arjovsky et al. 2017).

    Args:
        real: (batch,) logits of real images.
        fake: (batch,) logits of generated ones.
    """
    match kind:
        case "relativistic":
            return F.softplus(fake - real)
        case "non_saturating":
            return F.softplus(-real) + F.softplus(fake)
        case "hinge":
            return F.relu(1 - real) + F.relu(1 + fake)
        case "wasserstein":
            return fake - real


def generator_loss(kind: AdversarialKind, real: Tensor | None, fake: Tensor) -> Tensor:
    """What the generator minimises: softplus(real - fake), for ``non_saturating`` softplus(-fake), else -fake.

    Args:
        real: (batch,) logits of real images, which only ``relativistic`` looks at.
        fake: (batch,) logits of generated ones.
    """
    if kind == "relativistic":
        assert real is not None
        return F.softplus(real - fake)
    return F.softplus(-fake) if kind == "non_saturating" else -fake


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """(batch,) |d logit / d image|^2, differentiable: what R1 and R2 keep small (Mescheder et al. 2018, equation 9)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """(batch,) |J^T y|, differentiable: how far the latents move an image along random directions y.

    Karras et al. 2020 (StyleGAN2), section 3.2, with y divided by the root of the number of pixels, as in their code.

    Args:
        images: (batch, channels, height, width), drawn from the latents.
        latents: (batch, latent).
        noise: standard normal, like the images.
    """
    height, width = images.shape[2:]
    projected = (images * noise).sum() / (height * width) ** 0.5
    (gradient,) = torch.autograd.grad(projected, latents, create_graph=True)
    return gradient.square().sum(dim=1).sqrt()

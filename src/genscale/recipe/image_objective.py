"""The recipe's ``objective`` for images: diffusion in three forms, and adversarial training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genscale.recipe.amount import Amount
from genscale.recipe.base import Part


class Augmentation(Part):
    """Changes of whole batches on the device. Each is applied to an image with ``probability``; 0 leaves one out.

    What a GAN sees of it is never learned by the generator, as both sides are changed and the gradient goes through it;
    what a diffusion model sees of it is told to the network, unless ``leaky``.
    """

    probability: float = Field(default=0.5, ge=0, le=1)
    """Of each change, for each image; the first value where it adapts."""
    flip: bool = False
    """Left to right: half of the images that it is applied to are mirrored."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Degrees, either way."""
    translate: float = Field(default=0.0, ge=0, le=1)
    """Of the size, either way."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Factor up to 2 ** (3 x scale), or down."""
    colour: float = Field(default=0.0, ge=0)
    """Brightness, contrast and saturation change by up to this."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation, in units of the range -1 to 1."""
    cutout: float = Field(default=0.0, ge=0, le=1)
    """Side of a grey square, of the size."""
    target: float | None = Field(default=None, gt=0, lt=1)
    """GAN only: the probability follows the discriminator's overfitting to hold its signal here (ADA: 0.6)."""
    speed: Amount = Amount(100_000, "samples")
    """In which the probability can go from 0 to 1 (ADA: 500k images)."""
    leaky: bool = False
    """Plain augmentation: what is generated is augmented too (harmless for flips)."""


class _Denoising(Part):
    conditioning: Literal["auto", "none", "class", "text"] = "auto"
    """``auto``: class where the data has labels, else text where it has captions, else none."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """How often the condition is left out, so that guidance has something to push away from."""
    augmentation: Augmentation | None = None
    learned_uncertainty: bool = False
    """Weigh each noise level by a learned scale of its loss (Karras et al. 2024, section 2.2)."""

    @model_validator(mode="after")
    def _steady(self) -> _Denoising:
        if self.augmentation and self.augmentation.target is not None:
            raise ValueError("augmentation.target follows a discriminator, and diffusion has none: leave it out")
        return self


class FlowObjective(_Denoising):
    """Flow matching along straight lines (Liu et al. 2023; Lipman et al. 2023): the network gives the velocity."""

    kind: Literal["flow"] = "flow"
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    time_mean: float = 0.0
    """Of the logit of the time (Esser et al. 2024, equation 19); positive means more noise."""
    time_std: float = Field(default=1.0, gt=0)
    shift: float = Field(default=1.0, gt=0)
    """Sampling times t become shift t / (1 + (shift - 1) t): more steps where there is noise, for large images."""


class EDMObjective(_Denoising):
    """Preconditioned denoising (Karras et al. 2022, table 1)."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the data."""
    noise_mean: float = -1.2
    """Of the log of sigma in training."""
    noise_std: float = Field(default=1.2, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> EDMObjective:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min:g}) must be below sigma_max ({self.sigma_max:g})")
        return self


class DDPMObjective(_Denoising):
    """Denoising diffusion in discrete steps (Ho et al. 2020; Nichol and Dhariwal 2021)."""

    kind: Literal["ddpm"] = "ddpm"
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    noise_schedule: Literal["linear", "cosine"] = "linear"
    steps: int = Field(default=1000, ge=2)
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is pure noise (Lin et al. 2024); not with ``epsilon``."""
    min_snr: float | None = Field(default=None, gt=0)
    """Weigh each step by min(snr, this), as its prediction asks (Hang et al. 2023)."""

    @model_validator(mode="after")
    def _solvable(self) -> DDPMObjective:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "prediction 'epsilon' says nothing at a signal of zero: use 'v' or 'x0' with zero_terminal_snr"
            )
        return self


class AdversarialObjective(Part):
    """A generator and a discriminator against each other."""

    kind: Literal["adversarial"] = "adversarial"
    loss: Literal["relativistic", "non_saturating", "hinge", "wasserstein"] = "relativistic"
    """``relativistic`` pairs each real image with a generated one (Jolicoeur-Martineau 2019; R3GAN)."""
    conditioning: Literal["auto", "none", "class"] = "auto"
    r1: float = Field(default=1.0, ge=0)
    """Weight of the penalty on the discriminator's gradient at real images: r1 / 2 |grad|^2 (Mescheder et al. 2018)."""
    r2: float = Field(default=1.0, ge=0)
    """The same at generated images."""
    penalty_final: float = Field(default=1.0, gt=0)
    """Both weights fall along a cosine to this part of themselves over the budget."""
    gradient_penalty: float = Field(default=0.0, ge=0)
    """Weight of (|grad| - 1)^2 between real and generated images (Gulrajani et al. 2017)."""
    path_length: float = Field(default=0.0, ge=0)
    """Weight of the generator's path-length penalty (Karras et al. 2020)."""
    lazy: int = Field(default=1, ge=1)
    """Steps between penalties, which then weigh that much more."""
    augmentation: Augmentation | None = None

"""The recipe's ``sampling``: the samples drawn at each validation and at the end, for the report; and the defaults of
``genscale sample``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from genscale.recipe.base import Part


class TextSampling(Part):
    """Completions of prompts."""

    kind: Literal["text"] = "text"
    prompts: tuple[str, ...] = ()
    tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    stop: tuple[str, ...] = ()
    steps: int | None = Field(default=None, ge=1)
    """Unmasking steps of a masked-diffusion sampler; by default one a token."""
    order: Literal["random", "confidence"] = "random"
    """What that sampler unmasks first: random tokens, true to what was learned, or those the network is surest of."""


class ImageSampling(Part):
    """Images: how many, of what, and how they are drawn."""

    kind: Literal["images"] = "images"
    count: int = Field(default=64, ge=1)
    """Images in the report's grid."""
    labels: tuple[str, ...] = ()
    """Names of classes, taken in turn; by default all of them."""
    captions: tuple[str, ...] = ()
    """Captions, taken in turn, for models that were conditioned on text."""
    sampler: Literal["auto", "euler", "heun", "ddim", "dpm_solver_2m", "ancestral"] = "auto"
    """``auto``: heun for flow and EDM, DPM-Solver++(2M) for DDPM. Ignored by GANs, as are the next three."""
    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance (Ho and Salimans 2022): 1 is none, more follows the condition more closely."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels, as parts of the way from noise (0) to image (1), within which guidance acts (Kynkäänniemi et al.
    2024)."""
    truncation: float = Field(default=1.0, ge=0, le=1)
    """GANs: latents are pulled towards their mean; 1 leaves them, 0 gives the mean image."""

    @model_validator(mode="after")
    def _interval(self) -> ImageSampling:
        if self.guidance_interval and not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval goes up, within 0 and 1, not {list(self.guidance_interval)}")
        return self


Sampling = Annotated[TextSampling | ImageSampling, Field(discriminator="kind")]

"""What steers a sampler: each function makes a denoiser of one or two others.

All of them change the image that is expected in x, so they work alike with every family and every sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genscale.objectives.samplers import Denoiser


class Condition(NamedTuple):
    """What images are to be of, as a network is told it; None where it knows no such condition."""

    labels: Tensor | None
    """(batch,) int64; the number of classes means none."""
    captions: Tensor | None
    """(batch, tokens) int64; all zeros means none."""

    def and_then(self, other: Condition) -> Condition:
        """Both, along the batch."""
        pairs = zip(self, other, strict=True)
        return Condition(*(None if one is None or two is None else torch.cat((one, two)) for one, two in pairs))


ConditionalDenoiser = Callable[[Tensor, int, Condition], Tensor]
"""(x, number of the noise level, condition) -> the image that is expected in x."""


def classifier_free(model: ConditionalDenoiser, condition: Condition, nothing: Condition, guidance: float) -> Denoiser:
    """Away from what the model expects without the condition (Ho and Salimans 2022, equation 6, where 1 + w is our
    guidance); both come from one doubled batch."""
    both = condition.and_then(nothing)

    def denoise(x: Tensor, step: int) -> Tensor:
        image, without = model(torch.cat((x, x)), step, both).chunk(2)
        return torch.lerp(without, image, guidance)

    return denoise


def away_from(denoise: Denoiser, guide: Denoiser, guidance: float) -> Denoiser:
    """Away from what a weaker model expects: autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad
    version of itself", section 4)."""
    return lambda x, step: torch.lerp(guide(x, step), denoise(x, step), guidance)


def only_where(acts: Sequence[bool], guided: Denoiser, plain: Denoiser) -> Denoiser:
    """Guidance at some noise levels only (Kynkäänniemi et al. 2024); ``acts`` tells them by number."""
    return lambda x, step: guided(x, step) if acts[step] else plain(x, step)


def keeping(denoise: Denoiser, image: Tensor, mask: Tensor) -> Denoiser:
    """Inpainting: what is known is what is expected.

    Along every sampler's path the known part then is that image at each noise level, with its own noise: replacing it
    at every step (Lugmayr et al. 2022, equation 8) comes to the same, but would break a multistep sampler's memory.

    Args:
        image: (batch, channels, height, width).
        mask: (batch, 1, height, width) from 0, known, to 1, drawn anew.
    """
    return lambda x, step: torch.lerp(image, denoise(x, step), mask)

"""From noise to images: solvers of a diffusion model's differential equation, each written once for all families.

Along the probability-flow path (Song et al. 2021) x moves by dx = image d(alpha) + noise d(sigma), where image and
noise are what the model takes x to be made of. Each sampler follows it down a list of noise levels. Nothing divides
by alpha, so that a path may begin in pure noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from genscale.objectives.noise_levels import NoiseLevel
from genscale.runtime.randomness import Rng

Denoiser = Callable[[Tensor, int], Tensor]
"""The image that a model expects in x (batch, channels, height, width), at the noise level of this number."""

Sampler = Callable[[Denoiser, Tensor, Sequence[NoiseLevel[float]], Rng], Tensor]
"""(denoiser, x at the first level, levels from the noisiest down, draws) -> x at the last level."""


def euler(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel[float]], rng: Rng) -> Tensor:
    """Euler's method: first order.

    For every family it is also DDIM without added noise (Song, Meng and Ermon 2021, equation 12 with a standard
    deviation of 0), whose step keeps image and noise and mixes them anew: this path's frame makes both the same.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        image = denoise(x, step)
        x = there.mix(image, here.noise(x, image))
    return x


def heun(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel[float]], rng: Rng) -> Tensor:
    """Heun's method: second order, with two evaluations a step; the last, to no noise, is Euler's (Karras et al. 2022,
    algorithm 1)."""
    for step, (here, there) in enumerate(pairwise(levels)):
        image = denoise(x, step)
        noise = here.noise(x, image)
        ahead = there.mix(image, noise)
        if there.sigma > 0:
            later_image = denoise(ahead, step + 1)
            later_noise = there.noise(ahead, later_image)
            ahead = (
                x
                + (there.alpha - here.alpha) / 2 * (image + later_image)
                + (there.sigma - here.sigma) / 2 * (noise + later_noise)
            )
        x = ahead
    return x


def dpm_solver_2m(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel[float]], rng: Rng) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, with one evaluation a step.

    A step from pure noise or to no noise is infinitely long in log(alpha / sigma): there, and in the step after pure
    noise, it is the first-order one.
    """
    previous: Tensor | None = None
    previous_length = math.inf
    for step, (here, there) in enumerate(pairwise(levels)):
        image = denoise(x, step)
        length = _log_signal(there) - _log_signal(here)
        extrapolated = image
        if previous is not None and math.isfinite(length) and math.isfinite(previous_length):
            extrapolated = image + length / (2 * previous_length) * (image - previous)
        kept = there.sigma / here.sigma
        x = kept * x + (there.alpha - kept * here.alpha) * extrapolated
        previous, previous_length = image, length
    return x


def ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel[float]], rng: Rng) -> Tensor:
    """Draw from the posterior of the next level given x and the expected image (Ho et al. 2020, equations 6 and 7).

    The noise is kept in part and drawn in part, so that the variance is right whatever the image.
    """
    for step, (here, there) in enumerate(pairwise(levels)):
        image = denoise(x, step)
        noise = here.noise(x, image)
        if there.sigma > 0:
            kept = (there.sigma * here.alpha) / (there.alpha * here.sigma)
            fresh = rng.normal(f"ancestral {step}", tuple(x.shape[1:])).to(x.device)
            noise = kept * noise + math.sqrt(1 - kept**2) * fresh
        x = there.mix(image, noise)
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "ddim": euler,
    "dpm_solver_2m": dpm_solver_2m,
    "ancestral": ancestral,
}


def _log_signal(level: NoiseLevel[float]) -> float:
    """log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
    if level.alpha == 0:
        return -math.inf
    return math.inf if level.sigma == 0 else math.log(level.alpha / level.sigma)

"""From what is asked to images: where a sampler starts, what steers it, and how far it goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.objectives.guidance import keeping, only_where
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.noise_levels import NoiseLevel
from genscale.objectives.samplers import SAMPLERS, Denoiser
from genscale.runtime.errors import UserError, nearest
from genscale.runtime.randomness import Rng


def draw(
    plain: Denoiser,
    guided: Denoiser | None,
    levels: Sequence[NoiseLevel[float]],
    request: ImageRequest,
    shape: tuple[int, int, int],
    rng: Rng,
    device: torch.device,
) -> Tensor:
    """The images of a request that :func:`check` has seen: (batch, *shape).

    Args:
        guided: takes the place of ``plain`` where the request's guidance acts.
        levels: from the noisiest down to none, one more than steps; denoisers are given their numbers.
        shape: channels, height and width.
        rng: the seed and each image's number; so an image is the same in any batch.
    """
    denoise = plain
    if guided is not None:
        denoise = only_where(guidance_acts(request.guidance_interval, len(levels)), guided, plain)
    noise = (rng.normal("noise", shape) if request.noise is None else request.noise).to(device)
    image = torch.zeros_like(noise) if request.image is None else request.image.to(noise)
    if request.mask is not None:
        denoise = keeping(denoise, image, request.mask.to(noise))
    first = 0
    if request.image is not None:
        first = len(levels) - 1 - noised_steps(request.strength, len(levels) - 1)
    x = levels[first].mix(image, noise)
    return SAMPLERS[request.sampler](lambda x, step: denoise(x, first + step), x, levels[first:], rng)


def noised_steps(strength: float, steps: int) -> int:
    """How many of the last steps an image goes back: all at a strength of 1, always at least one."""
    return max(1, round(strength * steps))


def guidance_acts(interval: tuple[float, float] | None, levels: int) -> list[bool]:
    """Whether guidance acts at each noise level; the first is all the way from the image, the last is the image."""
    low, high = interval or (0.0, 1.0)
    return [low <= number / (levels - 1) < high for number in range(levels)]


def check(request: ImageRequest, images: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where what is asked is impossible for any diffusion model.

    Args:
        images: how many.
        shape: channels, height and width that the model draws.
    """
    if request.sampler not in ("auto", *SAMPLERS):
        known = ["auto", *SAMPLERS]
        raise UserError(
            f"sampler: expected one of {', '.join(known)}, not '{request.sampler}'{nearest(request.sampler, known)}"
        )
    if request.steps < 1:
        raise UserError(f"steps: expected at least 1, not {request.steps}")
    if request.truncation != 1 or request.latents is not None:
        raise UserError("truncation and latents are for GANs; a diffusion model has guidance, steps and noise")
    if not 0 < request.strength <= 1:
        raise UserError(f"strength: expected above 0 and up to 1, not {request.strength:g}")
    if request.image is None and (request.mask is not None or request.strength != 1):
        raise UserError(f"{'mask' if request.mask is not None else 'strength'}: there is no image to start from")
    expected = {"image": (images, *shape), "noise": (images, *shape), "mask": (images, 1, *shape[1:])}
    for name, size in expected.items():
        given = getattr(request, name)
        if given is not None and tuple(given.shape) != size:
            raise UserError(f"{name}: expected {' x '.join(map(str, size))}, not {' x '.join(map(str, given.shape))}")
    for name in ("labels", "captions"):
        given = getattr(request, name)
        if given is not None and len(given) != images:
            raise UserError(f"{name}: expected one for each of {images} images, not {len(given)}")

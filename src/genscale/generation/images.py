"""From an objective to images: each a function of the weights, the seed and its number, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genscale.data.description import ImageDescription
from genscale.data.image_latents import decode_latents
from genscale.generation.grid import grid, near_square, to_pixels
from genscale.objectives.adversarial import Adversarial
from genscale.objectives.conditioning import Conditioning
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.objective import Objective
from genscale.recipe.sampling import ImageSampling
from genscale.runtime.errors import UserError, nearest
from genscale.runtime.randomness import Rng


@dataclass(frozen=True)
class Start:
    """What images start from, beside the noise of the seed."""

    image: Tensor | None = None
    """(1, channels, height, width), as the objective draws them: latents, where it draws latents."""
    strength: float = 1.0
    """How far the image is noised, above 0: 1 is all the way, and none of it is left."""
    mask: Tensor | None = None
    """(1, 1, height, width), 1 where the image is drawn anew, 0 where it is kept."""
    towards: int | None = None
    """Another seed: images go from the one to the other, along an arc."""
    frames: int = 1
    """Images on the way between two seeds, both ends included."""


def draw(
    objective: Objective,
    described: ImageDescription,
    sampling: ImageSampling,
    *,
    count: int,
    seed: int,
    labels: Sequence[int] | None = None,
    captions: Tensor | None = None,
    device: torch.device,
    batch: int = 64,
    guide: Objective | None = None,
    start: Start | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw images.

    Image k depends on the weights, the seed, k and what it is to show; not on ``batch``, ``count`` or the device, but
    for rounding.

    Args:
        sampling: how; its ``count`` and ``captions`` are not used.
        labels: numbers of classes, taken in turn; by default those that ``sampling`` names, or else, where the model
            was told classes, all of them, so that each has its share.
        captions: (n, tokens) int64, taken in turn.
        device: where the images are given back; they are drawn where the objective is.
        guide: a weaker model to push away from (autoguidance).
        start: what to begin from; with ``towards``, image k is frame ``k % frames`` of the way of the seeds' images
            ``k // frames``, and labels and captions are taken in turn by the way.
        on_images: called with the number of images after each batch.

    Returns:
        (count, channels, height, width) float32 from -1 to 1, in pixels.

    Raises:
        UserError: a class that there is not, or what this model cannot do.
    """
    start = start or Start()
    if labels is None:
        if sampling.labels:
            labels = class_numbers(sampling.labels, described.classes)
        elif told(objective) == "class":
            labels = range(len(described.classes))
    drawn = []
    for first in range(0, count, batch):
        numbers = torch.arange(first, min(first + batch, count))
        ways = numbers // start.frames if start.towards is not None else numbers
        request = ImageRequest(
            labels=None if labels is None else torch.tensor(labels)[ways % len(labels)],
            captions=None if captions is None else captions[ways % len(captions)],
            sampler=sampling.sampler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            guidance_interval=sampling.guidance_interval,
            guide=guide,
            image=_for_each(start.image, len(numbers)),
            strength=start.strength,
            mask=_for_each(start.mask, len(numbers)),
            truncation=sampling.truncation,
            **_beginning(objective, described, seed, start, numbers),
        )
        images = objective.sample(request, Rng(seed, 0, "sample", ways)).float()
        if described.autoencoder is not None:
            images = decode_latents(described.autoencoder, images)
        drawn.append(images.clamp(-1, 1).to(device))
        if on_images is not None:
            on_images(len(numbers))
    return torch.cat(drawn)


def preview_grid(
    objective: Objective,
    described: ImageDescription,
    sampling: ImageSampling,
    seed: int,
    captions: Tensor | None = None,
) -> np.ndarray:
    """(h, w, c) uint8: the images that the recipe's ``sampling`` asks for, in a grid.

    With the same seed each time, the same images are seen to get better.

    Args:
        captions: (n, tokens) int64 of ``sampling.captions``; without them a model of captions draws without.
    """
    if captions is None and told(objective) == "text":
        captions = torch.zeros(1, described.caption_tokens, dtype=torch.long)
    device = next(objective.networks.parameters()).device
    images = draw(objective, described, sampling, count=sampling.count, seed=seed, captions=captions, device=device)
    return grid(to_pixels(images), *cells(sampling.count, _taken_in_turn(objective, described, sampling)))


def cells(count: int, taken_in_turn: int) -> tuple[int, int]:
    """Rows and columns: a column for each class where that fills the rows and stays legible, else a near square."""
    if 4 <= taken_in_turn <= 16 and count % taken_in_turn == 0:
        return count // taken_in_turn, taken_in_turn
    return near_square(count)


def told(objective: Objective) -> Literal["none", "class", "text"]:
    """What the objective's networks are told of an image."""
    if isinstance(objective, Adversarial):
        return "class" if objective.conditional else "none"
    conditioning = getattr(objective, "conditioning", None)
    return conditioning.kind if isinstance(conditioning, Conditioning) else "none"


def class_numbers(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The numbers of classes, by their names in any case, or by number; raises UserError for one that there is not."""
    if not classes:
        raise UserError(f"label: the images of this run have no classes, so there is no '{names[0]}'")
    known = {name.casefold(): number for number, name in reversed(list(enumerate(classes)))}
    known |= {name: number for number, name in enumerate(classes)}  # names that differ in case only
    numbers = []
    for name in names:
        number = known.get(name, known.get(name.casefold()))
        if number is None and name.isdecimal() and int(name) < len(classes):
            number = int(name)
        if number is None:
            shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
            raise UserError(f"label: no class '{name}'{nearest(name, list(classes)) or f'; there are {shown}'}")
        numbers.append(number)
    return numbers


def between(one: Tensor, other: Tensor, parts: Tensor) -> Tensor:
    """On the arc between two draws, where every point is as likely as they are (Shoemake 1985; White 2016).

    Args:
        one: (batch, ...), what a part of 0 gives.
        other: the same, for a part of 1.
        parts: (batch,) from 0 to 1.
    """
    from_, to = one.flatten(1).double(), other.flatten(1).double()
    angle = torch.acos(torch.nn.functional.cosine_similarity(from_, to).clamp(-1, 1))[:, None]
    part = parts.double()[:, None]
    sine = torch.sin(angle)
    straight = sine < 1e-6  # no arc between two of one direction
    arc = (torch.sin((1 - part) * angle) * from_ + torch.sin(part * angle) * to) / sine.masked_fill(straight, 1.0)
    return torch.where(straight, torch.lerp(from_, to, part), arc).to(one.dtype).view_as(one)


def _beginning(
    objective: Objective, described: ImageDescription, seed: int, start: Start, numbers: Tensor
) -> dict[str, Any]:
    """The request's noise, or latents of a GAN, where it is not the seed's own."""
    if start.towards is None:
        return {}
    shape: tuple[int, ...] = (described.channels, described.resolution, described.resolution)
    asked, drawn = "noise", "noise"
    if isinstance(objective, Adversarial):
        shape = (objective.shape.latent,)
        asked, drawn = "latents", "latent"
    ways, frames = numbers // start.frames, numbers % start.frames
    one, other = (Rng(each, 0, "sample", ways).normal(drawn, shape) for each in (seed, start.towards))
    return {asked: between(one, other, frames / max(1, start.frames - 1))}


def _for_each(one: Tensor | None, count: int) -> Tensor | None:
    return None if one is None else one.expand(count, *one.shape[1:])


def _taken_in_turn(objective: Objective, described: ImageDescription, sampling: ImageSampling) -> int:
    """How many different labels follow one another in a drawing that is not told which."""
    return len(sampling.labels) or (len(described.classes) if told(objective) == "class" else 1)

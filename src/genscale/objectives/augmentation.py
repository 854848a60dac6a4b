"""Changes of whole batches of images, on their device: flips, moves, turns, zooms, colours, noise, cutout.

One pipeline serves three uses. Plain: the images are changed, and nobody is told. Differentiable, for GANs (Zhao et al.
2020, Karras et al. 2020): real and generated images are changed alike and gradients go through, twice where a penalty
needs it, so that the generator never learns the changes. Told, for diffusion (Karras et al. 2022, appendix F.2): the
parameters are fed to the network, and sampling with zeros gives unchanged images.

The order is that of ADA (Karras et al. 2020, appendix B): geometry, colour, noise, cutout. What lies beyond an edge is
the image's own reflection. Values may leave -1 to 1, as a clip would cut gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.recipe.image_objective import Augmentation
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

PARAMETERS = (
    "flip",  # 1 where mirrored
    "cosine",  # of the angle, less 1
    "sine",  # of the angle
    "down",  # the move, in units of the farthest
    "right",
    "scale",  # logarithm of the factor, in units of the largest
    "brightness",  # in units of the largest change, as contrast and saturation
    "contrast",
    "saturation",
    "noise",  # 1 where there is some
    "cutout",  # 1 where there is one
    "cutout_down",  # its centre, from -1 to 1
    "cutout_right",
)
"""What a diffusion network is told about each image, in this order; all 0 where it is unchanged."""

AUGMENTATION_WIDTH = len(PARAMETERS)


def augment(
    images: Tensor, rng: Rng, options: Augmentation, probability: float | Tensor, name: str = "augment"
) -> tuple[Tensor, Tensor]:
    """Change each image, by each of the changes with this probability.

    A change draws its amount evenly from its range; that of a flip is {as it is, mirrored}, so that at a probability of
    1 one half is mirrored. Amounts are functions of ``rng`` alone: the same in a micro-batch of any size.

    Args:
        images: (batch, channels, height, width), half precision becomes float32. Differentiable, any number of times.
        rng: of these images.
        options: which changes there are, and their ranges; its own probability is not looked at.
        probability: from 0 to 1; a tensor of no dimensions where it adapts.
        name: before the names of the draws; another one changes the same samples in another way.

    Returns:
        The images, and (batch, AUGMENTATION_WIDTH) float32, the parameters: 0 exactly where a change left the image
        alone, which then has its bits unchanged.

    Raises:
        UserError: colours of latents are asked for.
    """
    batch, channels, height, width = images.shape
    told: dict[str, Tensor] = {}

    def draw(change: str, wanted: float, amounts: int = 1) -> Tensor:
        """(amounts, batch) evenly in (-1, 1) and never 0, but all 0 for the images that the change leaves alone."""
        if not wanted:
            return torch.zeros(amounts, batch, device=images.device)
        uniform = rng.uniform(f"{name}.{change}", (1 + amounts,))
        return ((2 * uniform[:, 1:] - 1 + 2**-24) * (uniform[:, :1] < probability)).T

    if images.dtype in (torch.bfloat16, torch.float16):
        images = images.float()
    if options.flip or options.translate:
        flipped = draw("flip", options.flip)[0] > 0
        farthest = torch.tensor([[options.translate * height], [options.translate * width]], device=images.device)
        moves = (draw("translate", options.translate, 2) * farthest).round()
        images = _flip_and_move(images, flipped, moves.long())
        told["flip"] = flipped
        told["down"], told["right"] = moves / farthest.clamp(min=1)
    if options.rotate or options.scale:
        angle = draw("rotate", options.rotate)[0] * math.radians(options.rotate)
        told["scale"] = draw("scale", options.scale)[0]
        cosine, sine = angle.cos(), angle.sin()
        factor = _power_of_2(3 * options.scale * told["scale"])
        grid = _grid(height, width, cosine, sine, factor).to(images.dtype)
        changed = (angle != 0) | (told["scale"] != 0)
        images = torch.where(_each(changed), _Resample.apply(images, grid), images)
        told["cosine"], told["sine"] = cosine - 1, sine
    if options.colour:
        if channels not in (1, 3):
            raise UserError(
                f"objective.augmentation.colour: latents of {channels} channels have no colours; leave it "
                "out, or store pixels (data.latents: null)"
            )
        shades = ("brightness", "contrast", "saturation")[: 2 if channels == 1 else 3]
        told |= {shade: draw(shade, options.colour)[0] for shade in shades}
        images = _recolour(images, *(options.colour * told[shade] for shade in shades))
    if options.noise:
        told["noise"] = draw("noise", options.noise)[0] != 0
        noise = rng.normal(f"{name}.noise.pixels", (channels, height, width))
        images = images + (options.noise * _each(told["noise"]) * noise).to(images.dtype)
    if options.cutout:
        images, centre = _cut_out(images, draw("cutout", options.cutout, 2), options.cutout)
        told["cutout"], told["cutout_down"], told["cutout_right"] = centre
    nothing = torch.zeros(batch, device=images.device)
    return images, torch.stack([told.get(parameter, nothing).float() for parameter in PARAMETERS], dim=1)


def _each(values: Tensor) -> Tensor:
    """(batch, 1, 1, 1) from (batch,)."""
    return values[:, None, None, None]


def _power_of_2(exponents: Tensor) -> Tensor:
    """As ``torch.exp2``, whose last bit on a CPU depends on where in the tensor, and so in the batch, a number is."""
    return torch.exp(math.log(2) * exponents)


def _flip_and_move(images: Tensor, flipped: Tensor, moves: Tensor) -> Tensor:
    """Mirrored left to right where ``flipped``, then moved by (2, batch) pixels down and right; not interpolated."""
    height, width = images.shape[2:]
    down, right = moves[:, :, None]  # (batch, 1)
    rows = _reflected(torch.arange(height, device=images.device) - down, height)  # (batch, height)
    columns = _reflected(torch.arange(width, device=images.device) - right, width)  # (batch, width)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    pixels = images.flatten(2)  # (batch, channels, height * width)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    return pixels.gather(2, index.expand_as(pixels)).view(images.shape)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Any integers into 0 to size - 1, reflected at the pixels' outer edges: c b a | a b c | c b a."""
    index = index % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def _grid(height: int, width: int, cosine: Tensor, sine: Tensor, factor: Tensor) -> Tensor:
    """(batch, height, width, 2) where each pixel of the result comes from, as ``grid_sample`` counts.

    The result is the image turned counter-clockwise about its centre and enlarged by ``factor``, each (batch,).
    """
    down = (torch.arange(height, device=cosine.device) - (height - 1) / 2)[:, None]  # (height, 1) pixels off the centre
    right = torch.arange(width, device=cosine.device) - (width - 1) / 2  # (width,)
    cosine, sine = (cosine / factor)[:, None, None], (sine / factor)[:, None, None]
    return torch.stack(
        ((cosine * right - sine * down) * (2 / width), (sine * right + cosine * down) * (2 / height)), dim=-1
    )


class _Resample(torch.autograd.Function):
    """Bilinear sampling of images on a grid, with derivatives of any order with respect to the images.

    torch has no derivative of the backward of ``grid_sample``. But sampling is linear in the images: its backward is
    the transposed map, and the backward of that is sampling again. The grid is drawn, not learned: it gets no gradient.
    """

    @staticmethod
    def forward(images: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ResampleTransposed.apply(gradient, ctx.saved_tensors[0]), None


class _ResampleTransposed(torch.autograd.Function):
    """What each pixel gave to a sampled image comes back to it."""

    @staticmethod
    def forward(gradient: Tensor, grid: Tensor) -> Tensor:
        # The images' values play no part in their own gradient: any tensor of their shape will do as the second.
        bilinear, reflection = 0, 2
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient, gradient, grid, bilinear, reflection, False, (True, False)
        )[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Resample.apply(gradient, ctx.saved_tensors[0]), None


def _recolour(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor | None = None) -> Tensor:
    """Lighter by ``brightness``; farther from mid-grey, and from their own grey, by factors 2 ** of the others."""
    images = (images + _each(brightness)) * _each(_power_of_2(contrast))
    if saturation is not None:
        grey = images.mean(dim=1, keepdim=True)
        images = images + (images - grey) * _each(_power_of_2(saturation) - 1)
    return images


def _cut_out(images: Tensor, places: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """A rectangle of this part of each side becomes mid-grey, as far as it lies in the image.

    Args:
        places: (2, batch) of the centre, from -1 to 1 down and right; 0 and 0: there is none.

    Returns:
        The images; and (3, batch): whether there is one, and where its central pixel is, from -1 to 1 down and right.
    """
    there = (places != 0).any(dim=0)
    hidden, told = [], [there.float()]
    for place, size in zip(places, images.shape[2:], strict=True):
        centre = ((place + 1) / 2 * size).long().clamp(max=size - 1)  # (batch,)
        side = max(1, round(part * size))
        offset = torch.arange(size, device=images.device) - (centre - side // 2)[:, None]  # (batch, size)
        hidden.append((offset >= 0) & (offset < side))
        told.append(((2 * centre + 1) / size - 1) * there)
    rows, columns = hidden
    mask = rows[:, :, None] & columns[:, None, :] & there[:, None, None]
    return images.masked_fill(mask[:, None], 0.0), torch.stack(told)

"""How images are noised, and what networks say of it: flow matching, EDM and DDPM in one form.

At every noise level x = alpha image + sigma noise, and a network that sees ``scale`` x answers with
``image_part`` image + ``noise_part`` noise (a velocity, the noise, ...). Those five numbers are all that tells the
families apart: the two equations give the image and the noise back from x and the answer, which is all that samplers
ask for.

| family | alpha | sigma | answer |
|---|---|---|---|
| flow | 1 - t | t | noise - image |
| EDM | 1 | sigma | (sigma / sigma_data image - sigma_data noise) / sqrt(sigma^2 + sigma_data^2) |
| DDPM | sqrt(alpha_bar) | sqrt(1 - alpha_bar) | noise; image; or v = alpha noise - sigma image |
"""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.runtime.errors import UserError

Number = TypeVar("Number", bound=Tensor | float)


class NoiseLevel(NamedTuple, Generic[Number]):
    """One noise level, in floats; or one for each image of a batch, in tensors."""

    alpha: Number
    """Of the image."""
    sigma: Number
    """Of the noise; 0 where an image is finished."""
    scale: Number
    """Of what the network sees."""
    image_part: Number
    """Of what the network answers."""
    noise_part: Number
    told: Number
    """The noise level as the network is told it."""

    def mix(self, image: Tensor, noise: Tensor) -> Tensor:
        """The noised image."""
        return self.alpha * image + self.sigma * noise

    def answer(self, image: Tensor, noise: Tensor) -> Tensor:
        """What the network should say of this image and this noise."""
        return self.image_part * image + self.noise_part * noise

    def image(self, x: Tensor, answer: Tensor) -> Tensor:
        """The image, from a noised one and what the network says of it. Not for a sigma of 0."""
        determinant = self.noise_part * self.alpha - self.image_part * self.sigma  # type: ignore[operator]
        return (self.noise_part * x - self.sigma * answer) / determinant

    def noise(self, x: Tensor, image: Tensor) -> Tensor:
        """The noise, from a noised image and the image. Not for a sigma of 0."""
        return (x - self.alpha * image) / self.sigma


def spread_out(levels: NoiseLevel[Tensor], like: Tensor) -> NoiseLevel[Tensor]:
    """Levels (batch,) as (batch, 1, 1, 1) on the device of the images, in their dtype."""
    shape = (-1, *[1] * (like.ndim - 1))
    return NoiseLevel(*(number.to(like).view(shape) for number in levels))


def one_by_one(levels: NoiseLevel[Tensor]) -> list[NoiseLevel[float]]:
    """Levels (n,) as n levels, and the image without noise at the end."""
    finished = NoiseLevel(alpha=1.0, sigma=0.0, scale=1.0, image_part=0.0, noise_part=0.0, told=0.0)
    return [*(NoiseLevel(*numbers) for numbers in zip(*(part.tolist() for part in levels), strict=True)), finished]


class NoiseSchedule(Protocol):
    """The noise levels of a family: those that it learns, and those that it samples at."""

    def learned(self, uniform: Tensor) -> NoiseLevel[Tensor]:
        """Levels of training from ``uniform`` (batch,) float32 in [0, 1); more of it is more noise."""

    def sampled(self, steps: int) -> NoiseLevel[Tensor]:
        """(steps,) float64 levels from the noisiest down; sampling ends without noise after them."""

    def weight(self, levels: NoiseLevel[Tensor]) -> Tensor:
        """(batch,) the weight of the squared error of the answer."""


class FlowNoise:
    """Straight lines between image and noise (Liu et al. 2023; Lipman et al. 2023), at times 0 (image) to 1 (noise)."""

    def __init__(self, options: FlowObjective):
        self.options = options

    def at(self, times: Tensor) -> NoiseLevel[Tensor]:
        one = torch.ones_like(times)
        return NoiseLevel(alpha=1 - times, sigma=times, scale=one, image_part=-one, noise_part=one, told=times)

    def learned(self, uniform: Tensor) -> NoiseLevel[Tensor]:
        if self.options.times == "uniform":
            return self.at(uniform)
        # Esser et al. 2024, equation 19: the logit of the time is normal.
        return self.at(torch.sigmoid(_normal(uniform, self.options.time_mean, self.options.time_std)))

    def sampled(self, steps: int) -> NoiseLevel[Tensor]:
        times = 1 - torch.arange(steps, dtype=torch.float64) / steps
        shift = self.options.shift
        return self.at(shift * times / (1 + (shift - 1) * times))  # Esser et al. 2024, equation 23

    def weight(self, levels: NoiseLevel[Tensor]) -> Tensor:
        return torch.ones_like(levels.sigma)


class EDMNoise:
    """Noise on top of the image, and a network whose input and answer have unit variance (Karras et al. 2022, table 1).

    The paper's weight of the denoiser's error, 1 / c_out^2, is a weight of 1 on the answer's.
    """

    def __init__(self, options: EDMObjective):
        self.options = options

    def at(self, sigmas: Tensor) -> NoiseLevel[Tensor]:
        data = self.options.sigma_data
        root = torch.sqrt(sigmas**2 + data**2)
        return NoiseLevel(
            alpha=torch.ones_like(sigmas),
            sigma=sigmas,
            scale=1 / root,
            image_part=sigmas / (data * root),
            noise_part=-data / root,
            told=sigmas.log() / 4,
        )

    def learned(self, uniform: Tensor) -> NoiseLevel[Tensor]:
        return self.at(_normal(uniform, self.options.noise_mean, self.options.noise_std).exp())

    def sampled(self, steps: int) -> NoiseLevel[Tensor]:
        """Equation 5."""
        rho = self.options.rho
        ramp = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        high, low = self.options.sigma_max ** (1 / rho), self.options.sigma_min ** (1 / rho)
        return self.at((high + ramp * (low - high)) ** rho)

    def weight(self, levels: NoiseLevel[Tensor]) -> Tensor:
        return torch.ones_like(levels.sigma)


class DDPMNoise:
    """Noise in place of the image, in discrete steps (Ho et al. 2020): step k, from 0, has the signal alpha_bar[k]."""

    def __init__(self, options: DDPMObjective):
        self.options = options
        self.alpha_bar = alpha_bar(options)

    def at(self, steps: Tensor) -> NoiseLevel[Tensor]:
        """Levels of int64 steps (n,): float32 on their device, float64 for steps on the CPU."""
        dtype = torch.float64 if steps.device.type == "cpu" else torch.float32
        alpha = self.alpha_bar.sqrt().to(dtype).to(steps.device)[steps]
        sigma = (1 - self.alpha_bar).sqrt().to(dtype).to(steps.device)[steps]
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        image_part, noise_part = {"epsilon": (zero, one), "x0": (one, zero), "v": (-sigma, alpha)}[
            self.options.prediction
        ]
        return NoiseLevel(alpha, sigma, one, image_part, noise_part, told=steps.to(dtype) / self.options.steps)

    def learned(self, uniform: Tensor) -> NoiseLevel[Tensor]:
        return self.at((uniform * self.options.steps).long())

    def sampled(self, steps: int) -> NoiseLevel[Tensor]:
        """From the very last step down, evenly ("trailing", Lin et al. 2024, section 3.3): no signal is skipped."""
        known = self.options.steps
        if steps > known:
            raise UserError(f"sampling.steps: {steps} are more than the model learned (objective.steps: {known})")
        places = known - torch.arange(steps, dtype=torch.float64) * (known / steps)
        return self.at(places.round().long() - 1)

    def weight(self, levels: NoiseLevel[Tensor]) -> Tensor:
        """Min-SNR (Hang et al. 2023, section 3.4): min(snr, limit) for images, in the terms of the answer."""
        if self.options.min_snr is None:
            return torch.ones_like(levels.sigma)
        ratio = (levels.alpha / levels.sigma) ** 2
        limited = ratio.clamp(max=self.options.min_snr)
        return {"x0": limited, "epsilon": limited / ratio, "v": limited / (ratio + 1)}[self.options.prediction]


def alpha_bar(options: DDPMObjective) -> Tensor:
    """(steps,) float64: the part of the variance that is still the image's, at each step."""
    steps = options.steps
    if options.noise_schedule == "linear":
        # Ho et al. 2020, section 4, for 1,000 steps; fewer are larger, so that they end in as much noise.
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    else:  # Nichol and Dhariwal 2021, equation 17
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        signal = torch.cos((times + 0.008) / 1.008 * (math.pi / 2)) ** 2
        beta = 1 - signal[1:] / signal[:-1]
    result = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
    if not options.zero_terminal_snr:
        return result
    root = result.sqrt()  # Lin et al. 2024, algorithm 1
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Normal numbers from uniform ones, by the quantile function."""
    above_zero = uniform.clamp(min=2.0**-24)  # the step of the uniform numbers: the logarithm of 0 has no use
    return mean + std * math.sqrt(2) * torch.erfinv(2 * above_zero - 1)

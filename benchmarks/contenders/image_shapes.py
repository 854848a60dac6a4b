"""The networks, data and figures that every contender of ``train_image.py`` shares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

RESOLUTION = 32
DIFFUSION_STEPS = 1000
EMA_DECAY = 0.995
EMA_HALF_LIFE = 138
"""Steps in which that decay halves."""


@dataclass(frozen=True)
class UNetShape:
    """Two residual blocks up for each down plus one, attention at the levels named and in the middle."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    head_width: int
    batch: int
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.multipliers)


@dataclass(frozen=True)
class GANShape:
    """A pair of networks; relativistic loss with R1 and R2 at every step."""

    kind: str
    """``model.kind``: "gan" for mirrored residual blocks, "dcgan" for strided convolutions."""
    latent: int
    generator: tuple[int, ...]
    discriminator: tuple[int, ...]
    dcgan: int
    """Step channels with which torchgan's DCGAN pair is the same, or has as many multiplications."""
    batch: int
    penalty: float = 1.0
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0


SHAPES: dict[str, UNetShape | GANShape] = {
    "unet-small": UNetShape(32, (1, 2, 2), 1, (2,), 32, 64),
    "unet-9m": UNetShape(64, (1, 2, 2, 2), 2, (2, 3), 64, 64),
    "gan-small": GANShape("dcgan", 64, (256, 128, 64), (64, 128, 256), 64, 64),
    "gan": GANShape("gan", 64, (256, 128, 64), (64, 128, 256), 144, 64),
}


def arguments() -> tuple[str, Path, str, int, bool, str]:
    """Name of the shape, folder of ``train.npy``, precision, steps, compile, device: as the driver passes them."""
    shape, folder, precision, steps, compiled, device = sys.argv[1:7]
    return shape, Path(folder), precision, int(steps), compiled == "compile", device


def size(*networks: torch.nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def batches(folder: Path, batch: int, device: str, seed: int = 0) -> Iterator[torch.Tensor]:
    """Endless random batches, (batch, channels, 32, 32) float32 from -1 to 1."""
    images = np.load(folder / "train.npy", mmap_mode="r")  # (images, channels, 32, 32) uint8
    draw = np.random.default_rng(seed)
    while True:
        chosen = torch.from_numpy(images[draw.integers(0, len(images), batch)])
        yield chosen.to(device, non_blocking=True).float().div_(127.5).sub_(1)


class Average:
    """An exponential average of the weights, as a straight loop would keep it."""

    def __init__(self, network: torch.nn.Module):
        self.weights = list(network.parameters())
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.averages, self.weights, 1 - EMA_DECAY)

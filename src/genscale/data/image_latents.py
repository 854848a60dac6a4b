"""Latents: images through a diffusers autoencoder (``AutoencoderKL`` in a local folder), and back.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1: a diffusion model
learns in the autoencoder's space, of a fraction of the pixels. What is stored is the mean of the encoder's
distribution, shifted and scaled to about unit variance as the autoencoder's configuration says
(``(z - shift_factor) * scaling_factor``).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.recipe.image_data import ImageData
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum


class Autoencoder:
    """An ``AutoencoderKL`` on a device, in float32. Load one with :meth:`load`."""

    def __init__(self, folder: Path, network: Any, device: torch.device):
        self.folder = folder
        self.device = device
        self._network = network.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self._scale = float(network.config.scaling_factor)
        self._shift = float(network.config.get("shift_factor") or 0.0)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None) -> Autoencoder:
        """Read the autoencoder in a folder that ``diffusers`` wrote; by default onto the accelerator, if there is one.

        Raises:
            UserError: diffusers is not installed, or the folder holds no autoencoder.
        """
        path = _folder(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError("data.latents needs the library diffusers: pip install 'genscale[diffusers]'") from None
        try:
            network = AutoencoderKL.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises many kinds
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"data.latents.autoencoder: {path} is no AutoencoderKL: {reason}") from None
        return cls(path, network, pick_device() if device is None else device)

    def check(self, data: ImageData) -> None:
        """Raises UserError where the recipe's images do not fit the autoencoder."""
        channels = self._network.config.in_channels
        if data.channels != channels:
            raise UserError(f"data.channels is {data.channels}, but the autoencoder {self.folder} takes {channels}")
        if data.resolution % self._reduction:
            raise UserError(
                f"data.resolution is {data.resolution}, but the autoencoder {self.folder} needs a multiple of "
                f"{self._reduction}"
            )

    def shape(self, resolution: int) -> tuple[int, int]:
        """Channels and resolution of the latents of images of this resolution."""
        return self._network.config.latent_channels, resolution // self._reduction

    @property
    def _reduction(self) -> int:
        """Pixels across one latent cell: each block of the encoder but the last halves the resolution."""
        return 2 ** (len(self._network.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(images, height, width, channels) uint8 -> (images, height', width', channels') float16.

        Raises:
            UserError: a latent is beyond what float16 holds.
        """
        images = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        mean = self._network.encode(images.to(self.device)).latent_dist.mode()
        latents = ((mean - self._shift) * self._scale).permute(0, 2, 3, 1).cpu().numpy()
        stored = latents.astype(np.float16)
        if not np.isfinite(stored).all():
            raise UserError(f"the autoencoder {self.folder} gives latents that float16 cannot hold")
        return stored

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(images, channels', height', width') -> (images, channels, height, width) float32, about -1 to 1."""
        given = latents.to(self.device, torch.float32) / self._scale + self._shift
        return self._network.decode(given).sample.to(latents.device)


def decode_latents(folder: str, latents: Tensor, batch: int = 16) -> Tensor:
    """Images of latents, ``batch`` at a time; the autoencoder is loaded once in a process.

    Args:
        folder: the autoencoder's, as ``ImageDescription.autoencoder`` names it.
        latents: (images, channels', height', width'), scaled as they are stored.

    Returns:
        (images, channels, height, width) float32, about -1 to 1.
    """
    autoencoder = _loaded(folder)
    return torch.cat([autoencoder.decode(part) for part in latents.split(batch)])


@functools.lru_cache(maxsize=2)
def _loaded(folder: str) -> Autoencoder:
    return Autoencoder.load(folder)


def autoencoder_checksum(folder: str) -> str:
    """Of the configuration and the weights.

    Raises:
        UserError: the folder holds no autoencoder.
    """
    path = _folder(folder)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]):
        digest.update(f"{file.name} {checksum(file)}\n".encode())
    return digest.hexdigest()


def _folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    if not (path / "config.json").exists():
        raise UserError(
            f"data.latents.autoencoder: {path} has no config.json; expected a folder that diffusers' "
            "AutoencoderKL.save_pretrained wrote"
        )
    return path

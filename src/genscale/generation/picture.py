"""Pictures that a drawing starts from, made as the training images were made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genscale.data.image_decode import BadImage, decode, fit
from genscale.generation.grid import from_pixels
from genscale.recipe.image_data import ImageData
from genscale.runtime.errors import UserError


def read_picture(path: str | Path, data: ImageData) -> Tensor:
    """(1, channels, resolution, resolution) from -1 to 1, as ``data`` says; raises UserError for no picture."""
    return from_pixels(_read(path, data)[None])


def read_mask(path: str | Path, data: ImageData, resolution: int) -> Tensor:
    """(1, 1, resolution, resolution) of 0 and 1 from a picture: 1, where it is white, is what is to be drawn.

    Args:
        data: says how a picture is made square.
        resolution: of what is drawn: pixels, or cells of latents.

    Raises:
        UserError: no such file, none that is a picture, or one without any white.
    """
    pixels = _read(path, data.model_copy(update={"resolution": resolution, "channels": 1}))
    mask = torch.from_numpy(pixels[:, :, 0] >= 128).float()[None, None]
    if not mask.any():
        raise UserError(f"{path}: a mask is white where an image is to be drawn, and this has no white")
    return mask


def _read(path: str | Path, data: ImageData) -> np.ndarray:
    """(resolution, resolution, channels) uint8."""
    try:
        return fit(decode(Path(path).expanduser().read_bytes()), data)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a picture") from None
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: cannot be read as a picture: {error}") from None

"""From the bytes of an image file, or an array, to 8-bit pixels at the training resolution."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from genscale.recipe.image_data import ImageData

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # modes of Pillow with more than 8 bits of grey


class BadImage(Exception):
    """What is wrong with an image, in words; never leaves the data package."""


def decode(content: bytes | np.ndarray) -> Image.Image:
    """The image in a file's bytes, upright as its EXIF orientation says, or in an array (height, width[, channels]).

    Raises:
        BadImage: it is empty, cut short, damaged, or not an image.
    """
    if isinstance(content, np.ndarray):
        return _from_array(content)
    if not content:
        raise BadImage("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large images, odd metadata
            image = Image.open(io.BytesIO(content))
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise BadImage("it is not an image that Pillow knows") from None
    except Exception as error:  # each of Pillow's formats raises its own kinds where a file is damaged
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def fit(image: Image.Image, data: ImageData) -> np.ndarray:
    """(resolution, resolution, channels) uint8: in the recipe's colours, resized with antialiasing (Lanczos).

    Raises:
        BadImage: its values are in no known range.
    """
    image = _in_colours(image, data.channels)
    size = (data.resolution, data.resolution)
    if data.fit == "stretch":
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif data.fit == "pad":
        image = _padded(image, data.resolution)
    else:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)  # the largest square in its middle
    return np.asarray(image, np.uint8).reshape(*size, data.channels)


def _padded(image: Image.Image, resolution: int) -> Image.Image:
    scale = resolution / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    page = Image.new(image.mode, (resolution, resolution), "white")
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    page.paste(resized, ((resolution - width) // 2, (resolution - height) // 2))
    return page


def _in_colours(image: Image.Image, channels: int) -> Image.Image:
    """In grey (ITU-R 601 luma) or RGB, 8 bits, what is transparent on white."""
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    elif image.mode == "F":
        image = Image.fromarray(_from_unit_range(np.asarray(image)))
    elif image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page.convert("RGB")
    try:
        return image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # of the rarest modes, such as LAB
        raise BadImage(str(error)) from None


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit greys as 8-bit ones, rounded: 65535 becomes 255."""
    if values.min() < 0 or values.max() > 65_535:
        raise BadImage(f"its greys go from {values.min()} to {values.max()}, expected at most 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_unit_range(values: np.ndarray) -> np.ndarray:
    """Floats of 0 to 1 as 8-bit values, rounded."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN is in no range
        raise BadImage(f"its values go from {low:g} to {high:g}, expected floats from 0 to 1, or integers")
    return np.rint(values * 255).astype(np.uint8)


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or not values.size:
        raise BadImage(f"an array of shape {values.shape}, expected (height, width) or (height, width, 1 to 4)")
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(values.dtype, np.floating):
        values = _from_unit_range(values)
    elif values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.integer):
            raise BadImage(f"an array of {values.dtype}, expected integers or floats")
        values = _eight_bits(values) if values.dtype == np.uint16 else _narrowed(values)
    modes: dict[int, Any] = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    return Image.frombytes(modes[channels], (values.shape[1], values.shape[0]), np.ascontiguousarray(values).tobytes())


def _narrowed(values: np.ndarray) -> np.ndarray:
    """Wider integers that hold 8-bit values."""
    if values.min() < 0 or values.max() > 255:
        raise BadImage(f"{values.dtype} values from {values.min()} to {values.max()}, expected 0 to 255")
    return values.astype(np.uint8)

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genscale.data.image_decode import BadImage, decode, fit
from genscale.recipe.image_data import ImageData


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def fitted(content: bytes | np.ndarray, resolution: int = 4, **options: Any) -> np.ndarray:
    return fit(decode(content), ImageData(resolution=resolution, **options))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


# Colours and depths


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_pixels_of_a_lossless_file_of_the_right_size_are_kept(format: str) -> None:
    pixels = noise(6, 6)
    content = encoded(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(fitted(content, 6), pixels)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),  # what is transparent is white
        ("LA", (100, 255), (100, 100, 100)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (200, 10, 10, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black on white
        ("RGBA", (200, 10, 10, 255), (200, 10, 10)),
        ("I;16", 65_535, (255, 255, 255)),
        ("I;16", 32_896, (128, 128, 128)),  # 128 * 257
        ("I;16", 128, (0, 0, 0)),
        ("I;16", 129, (1, 1, 1)),  # rounded: 129 / 257 is just above one half
    ],
)
def test_every_mode_of_a_png_becomes_rgb(mode: str, value: Any, expected: tuple[int, ...]) -> None:
    content = encoded(Image.new(mode, (4, 4), value))
    assert fitted(content).reshape(-1, 3).tolist() == [list(expected)] * 16


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert fitted(encoded(image))[0, 0].tolist() == [10, 20, 30]
    assert fitted(encoded(image, transparency=1))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_and_its_grey() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red = fitted(content, 8)[0, 0].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 4
    assert abs(int(fitted(content, 8, channels=1)[0, 0, 0]) - 76) <= 4  # 0.299 * 255


def test_grey_is_the_luma_of_itu_601_and_has_one_channel() -> None:
    pixels = noise(5, 5)
    grey = fitted(encoded(Image.fromarray(pixels)), 5, channels=1)
    assert grey.shape == (5, 5, 1)
    assert np.abs(grey[:, :, 0] - pixels @ [0.299, 0.587, 0.114]).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((4, 4), True), 255),
        (np.full((4, 4), 9, np.int64), 9),
        (np.full((4, 4), 0.5, np.float32), 128),
        (np.full((4, 4, 1), 1.0), 255),
        (np.full((4, 4), 65_535, np.uint16), 255),
    ],
)
def test_arrays_of_other_types(values: np.ndarray, expected: int) -> None:
    assert fitted(values, channels=1).tolist() == [[[expected]] * 4] * 4


def test_an_array_of_colours_is_taken_as_it_is() -> None:
    pixels = noise(6, 6)
    assert np.array_equal(fitted(pixels, 6), pixels)
    assert np.array_equal(fitted(np.dstack([pixels, np.full((6, 6), 255, np.uint8)]), 6), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_undone(orientation: int) -> None:
    """EXIF 2.3, table "Orientation": what to do to the stored rows to see the scene."""
    scene = noise(6, 6)
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: np.rot90(scene, 1),
        7: scene[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(scene, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(fitted(content, 6), scene)


# Sizes


def lanczos(length: int, size: int) -> np.ndarray:
    """(size, length) float64: weights of Lanczos' filter of three lobes, widened by the factor of reduction."""
    scale = length / size
    width = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distance = (np.arange(length) + 0.5 - centres[:, None]) / width
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 61), (55, 40), (9, 13)])
def test_crop_takes_the_largest_square_in_the_middle_antialiased(height: int, width: int) -> None:
    size, side = 10, min(height, width)
    # Smooth, so that Lanczos does not overshoot 0 and 255.
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([100 + 50 * np.sin(y / 5 + c) * np.cos(x / 7) for c in range(3)], -1).round().astype(np.uint8)
    square = pixels
    if (height - side) % 2 == 0 and (width - side) % 2 == 0:
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        weights = lanczos(side, size)
        expected = np.einsum("ih,jw,hwc->ijc", weights, weights, square.astype(float))
        assert np.abs(fitted(encoded(Image.fromarray(pixels)), size) - expected).max() <= 1.0
    else:  # half a pixel off each side: Pillow's box
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        expected = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS, box))
        assert np.array_equal(fitted(encoded(Image.fromarray(pixels)), size), expected)


def test_a_fine_pattern_becomes_grey_and_not_stripes() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = fitted(encoded(Image.fromarray(stripes)), 8, channels=1)
    assert np.abs(small.astype(int) - 128).max() <= 6  # without antialiasing it would be 0 or 255


def test_pad_keeps_the_whole_image_between_white_borders() -> None:
    pixels = np.full((20, 40, 3), 7, np.uint8)
    found = fitted(encoded(Image.fromarray(pixels)), 8, fit="pad")
    assert (found[2:6] == 7).all()
    assert (found[:2] == 255).all()
    assert (found[6:] == 255).all()


def test_an_image_of_one_row_is_padded_too() -> None:
    found = fitted(np.zeros((1, 500, 3), np.uint8), 8, fit="pad")
    assert sorted(np.unique(found, return_counts=True)[1].tolist()) == [8 * 3, 7 * 8 * 3]


def test_stretch_uses_the_whole_image() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 200
    found = fitted(encoded(Image.fromarray(pixels)), 8, fit="stretch")
    assert found[:, 0].max() == 0
    assert found[:, -1].min() == 200
    assert fitted(encoded(Image.fromarray(pixels)), 8).shape == (8, 8, 3)


# What is no image


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
PNG = encoded(Image.fromarray(noise(64, 64)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"not an image at all", "it is not an image that Pillow knows"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:20], "(?i)truncated"),
        (np.zeros((2, 3, 5, 3), np.uint8), r"an array of shape \(2, 3, 5, 3\)"),
        (np.zeros((4, 4, 7), np.uint8), "an array of shape"),
        (np.zeros((0, 4), np.uint8), "an array of shape"),
        (np.full((4, 4), 300, np.int32), "int32 values from 300 to 300, expected 0 to 255"),
        (np.full((4, 4), 2.5), "its values go from 2.5 to 2.5, expected floats from 0 to 1"),
        (np.full((4, 4), np.nan), "expected floats from 0 to 1"),
        (np.full((4, 4), "a"), "an array of <U1, expected integers or floats"),
    ],
)
def test_what_is_no_image_is_told_in_words(content: bytes | np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        fitted(content)
    assert "\n" not in str(caught.value)


def test_an_image_that_would_fill_the_memory_is_refused() -> None:
    """A decompression bomb: a header that promises 10^10 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(content)


def test_floats_of_a_tiff_are_from_0_to_1() -> None:
    assert fitted(encoded(Image.new("F", (4, 4), 0.25), "TIFF"), channels=1).max() == 64
    with pytest.raises(BadImage, match="expected floats from 0 to 1"):
        fitted(encoded(Image.new("F", (4, 4), 99.0), "TIFF"))

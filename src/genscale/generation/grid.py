"""Drawn images as files: eight bits a channel, grids, PNG, npz."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically


def to_pixels(images: Tensor) -> np.ndarray:
    """(n, c, h, w) from -1 to 1, to (n, h, w, c) uint8; values beyond the range are cut off."""
    levels = (images.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def from_pixels(pixels: np.ndarray) -> Tensor:
    """(n, h, w, c) uint8, to (n, c, h, w) float32 from -1 to 1: the inverse of :func:`to_pixels`."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def parse_grid(text: str) -> tuple[int, int]:
    """``"4x8"`` to 4 rows of 8 images."""
    found = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text.strip().lower())
    rows, columns = (int(number) for number in found.groups()) if found else (0, 0)
    if not rows or not columns:
        raise UserError(f"grid: expected rows and columns such as 8x8, found '{text}'")
    return rows, columns


def near_square(count: int) -> tuple[int, int]:
    """Rows and columns for ``count`` images, no more rows than columns: 64 as 8 x 8, 10 as 3 x 4."""
    columns = math.isqrt(count - 1) + 1
    return -(-count // columns), columns


def grid(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Images row by row without gaps, so that a grid can be cut apart again.

    Args:
        pixels: (n, h, w, c), n at most rows x columns; places left over are black.

    Returns:
        (rows x h, columns x w, c).
    """
    count, height, width, channels = pixels.shape
    if count > rows * columns:
        raise UserError(f"grid: {rows}x{columns} has no room for {count} images")
    cells = np.zeros((rows * columns, height, width, channels), dtype=pixels.dtype)
    cells[:count] = pixels
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def png_bytes(pixels: np.ndarray) -> bytes:
    """(h, w, c) uint8 as a PNG, grey for one channel and colour for three."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG", optimize=True)
    return file.getvalue()


def writable(path: str | Path) -> Path:
    """The path, if images can be written to it; raises UserError, before anything is drawn, where they cannot."""
    path = Path(path).expanduser()
    if path.suffix not in ("", ".png", ".npz") and not path.is_dir():
        raise UserError(f"{path}: images are written as .png (one grid), .npz (arrays) or into a folder")
    is_file = path.suffix in (".png", ".npz")
    if path.exists() and path.is_dir() == is_file:
        kinds = ("a file", "a folder") if is_file else ("a folder", "a file")
        raise UserError(f"{path}: expected {kinds[0]}, but it is {kinds[1]}")
    above = next(folder for folder in (path, *path.parents)[1:] if folder.exists())
    if not above.is_dir():
        raise UserError(f"{path}: {above} is a file, not a folder")
    return path


def save_images(path: Path, pixels: np.ndarray, names: Sequence[str] | None, cells: tuple[int, int]) -> list[Path]:
    """Write images to a :func:`writable` path, as its ending says: one grid (``.png``), arrays (``.npz``), or PNGs.

    A folder has a folder for each class, and arrays are called ``image`` and ``label``, so that both can be read as
    training data again.

    Args:
        pixels: (n, h, w, c) uint8.
        names: the class of each image, where it has one.
        cells: rows and columns of a grid.

    Returns:
        The files that were written.
    """
    if path.suffix == ".png":
        return [_write(path, png_bytes(grid(pixels, *cells)))]
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"image": pixels}
        if names is not None:
            arrays["label"] = np.array(names)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return [_write(path, file.getvalue())]
    digits = max(5, len(str(len(pixels) - 1)))
    folders = [path] * len(pixels) if names is None else [path / _as_folder(name) for name in names]
    return [
        _write(folder / f"{number:0{digits}}.png", png_bytes(image))
        for number, (folder, image) in enumerate(zip(folders, pixels, strict=True))
    ]


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _as_folder(name: str) -> str:
    """A class's name as the name of a folder: ``T-shirt/top`` as ``T-shirt-top``."""
    return re.sub(r"[/\\\0]", "-", name).strip(".") or "-"

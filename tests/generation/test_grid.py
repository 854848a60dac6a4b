"""Images as files: what is written is what was drawn, and other programs read it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.generation.grid import (
    from_pixels,
    grid,
    near_square,
    parse_grid,
    png_bytes,
    save_images,
    to_pixels,
    writable,
)
from genscale.runtime.errors import UserError


def numbered(count, size=2, channels=1):
    """Images of one value each: their number."""
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(pixels, (count, size, size, channels)).copy()


def test_pixels_and_back_are_exact_for_all_256_levels():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = from_pixels(pixels)
    assert images.shape == (1, 1, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert (to_pixels(images) == pixels).all()


def test_values_beyond_the_range_are_cut_off_and_halves_go_to_the_nearest():
    images = torch.tensor([-7.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert to_pixels(images).flatten().tolist() == [0, 0, 128, 255, 255]


def test_a_grid_is_filled_row_by_row():
    made = grid(numbered(5), rows=2, columns=3)
    assert made[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert made.shape == (4, 6, 1)
    with pytest.raises(UserError, match="2x2 has no room for 5"):
        grid(numbered(5), 2, 2)


@pytest.mark.parametrize(("text", "expected"), [("8x8", (8, 8)), (" 2 X 10", (2, 10)), ("3×4", (3, 4))])
def test_grids_are_read_as_rows_by_columns(text, expected):
    assert parse_grid(text) == expected


@pytest.mark.parametrize("text", ["8", "0x8", "8x", "x", "8x8x8", "-1x2", "a x b", ""])
def test_a_grid_that_is_none_is_told_in_one_line(text):
    with pytest.raises(UserError, match="expected rows and columns such as 8x8"):
        parse_grid(text)


def test_near_squares_have_room_and_no_empty_row():
    for count in range(1, 200):
        rows, columns = near_square(count)
        assert rows <= columns
        assert (rows - 1) * columns < count <= rows * columns
    assert near_square(64) == (8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_another_program_reads_the_same_pixels_from_the_png(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    opened = Image.open(io.BytesIO(png_bytes(pixels)))
    assert opened.mode == {1: "L", 3: "RGB"}[channels]
    assert (np.asarray(opened).reshape(pixels.shape) == pixels).all()


def test_arrays_hold_pixels_and_names(tmp_path):
    [path] = save_images(tmp_path / "drawn.npz", numbered(3), ["a", "b", "a"], (1, 3))
    arrays = np.load(path)
    assert (arrays["image"] == numbered(3)).all()
    assert arrays["label"].tolist() == ["a", "b", "a"]
    [path] = save_images(tmp_path / "plain.npz", numbered(3), None, (1, 3))
    assert np.load(path).files == ["image"]


def test_a_folder_has_a_folder_for_each_class(tmp_path):
    written = save_images(tmp_path / "drawn", numbered(3), ["Bag", "T-shirt/top", "Bag"], (1, 3))
    assert [str(path.relative_to(tmp_path / "drawn")) for path in written] == [
        "Bag/00000.png",
        "T-shirt-top/00001.png",
        "Bag/00002.png",
    ]
    assert [np.asarray(Image.open(path)).max() for path in written] == [0, 1, 2]
    [first, *_] = save_images(tmp_path / "plain", numbered(2), None, (1, 2))
    assert first == tmp_path / "plain" / "00000.png"


@pytest.mark.parametrize("name", ["..", "../x", "/etc", ""])
def test_no_class_leads_out_of_the_folder(tmp_path, name):
    [path] = save_images(tmp_path / "drawn", numbered(1), [name], (1, 1))
    assert path.resolve().is_relative_to((tmp_path / "drawn").resolve())


def test_paths_that_cannot_be_written_are_told_before_anything_is_drawn(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (
        ("a.jpg", "written as .png"),
        ("folder.png", "expected a file, but it is a folder"),
        ("file", "expected a folder, but it is a file"),
        ("file/a.png", "file is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            writable(tmp_path / name)
    assert writable(tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"

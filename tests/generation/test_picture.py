"""Pictures to start from are made as training images are."""

import numpy as np
import pytest
from PIL import Image

from genscale.generation.grid import png_bytes, to_pixels
from genscale.generation.picture import read_mask, read_picture
from genscale.recipe.image_data import ImageData
from genscale.runtime.errors import UserError


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 1), ("1", 3)])
def test_a_picture_of_any_mode_becomes_an_image_of_the_right_shape(tmp_path, mode, channels):
    Image.new("L", (40, 20), 255).convert(mode).save(tmp_path / "white.png")
    image = read_picture(tmp_path / "white.png", ImageData(channels=channels, resolution=8))
    assert image.shape == (1, channels, 8, 8)
    assert (image == 1).all()


def test_the_middle_of_a_picture_is_taken(tmp_path):
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = np.arange(8, dtype=np.uint8) * 30
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (
        to_pixels(read_picture(tmp_path / "wide.png", ImageData(channels=1, resolution=8)))[0, :, :, 0] == wide[:, 8:16]
    ).all()


def test_a_mask_is_one_where_it_is_white(tmp_path):
    drawn = np.zeros((16, 16), np.uint8)
    drawn[:, 8:] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", ImageData(), 4)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].tolist() == [[0, 0, 1, 1]] * 4
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="this has no white"):
        read_mask(tmp_path / "black.png", ImageData(), 4)


def test_files_that_are_no_pictures_are_told_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = png_bytes(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("none.png", "no such file"),
        ("text.png", "cannot be read as a picture"),
        ("empty.png", "cannot be read as a picture"),
        ("torn.png", "cannot be read as a picture"),
        (".", "cannot be read as a picture"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_picture(tmp_path / name, ImageData(resolution=8))
        assert "\n" not in str(error.value)

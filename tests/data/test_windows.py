from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genscale.data.windows import WindowReader


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("sizes", [(300,), (100, 0, 200), (5, 3, 1, 1, 290), (1,) * 300], ids=str)
def test_windows_equal_slices_of_the_joined_arrays(tmp_path: Path, sizes: tuple[int, ...], dtype: type) -> None:
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 300, dtype=dtype)
    for number, piece in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        np.save(tmp_path / f"{number:03}.npy", piece)
    mapped = [np.load(file, mmap_mode="r") for file in sorted(tmp_path.iterdir())]
    reader = WindowReader(mapped, width=20)
    starts = np.array([280, 0, 7, 95, 99, 100, 279, 120, 7])
    windows = reader.read(reader.locate(starts))
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows, [tokens[start : start + 20] for start in starts])


def test_after_the_last_token_come_zeros() -> None:
    reader = WindowReader([np.arange(1, 6, dtype=np.uint16), np.arange(6, 9, dtype=np.uint16)], width=4)
    windows = reader.read(reader.locate(np.array([3, 5, 7])))
    assert windows.tolist() == [[4, 5, 6, 7], [6, 7, 8, 0], [8, 0, 0, 0]]

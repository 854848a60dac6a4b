"""Reading windows of consecutive tokens from memory-mapped arrays, fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Places(NamedTuple):
    """Where windows are."""

    arrays: NDArray[np.int64]
    """(windows,) the number of the array that the window starts in; minus one minus that where it runs past its end."""
    offsets: NDArray[np.int64]
    """(windows,) the window's first token within that array."""


class WindowReader:
    """Windows over arrays of tokens that lie end to end.

    Args:
        arrays: 1-D, of unsigned integers, memory-mapped or not.
        width: tokens in a window.
    """

    def __init__(self, arrays: Sequence[np.ndarray], width: int):
        self.width = width
        # Plain arrays over the same memory: slicing numpy's memmap class costs ten times as much.
        self._arrays = [np.asarray(array) for array in arrays if len(array)]
        self._first = np.cumsum([0] + [len(array) for array in self._arrays])  # (arrays + 1,) each one's first token
        # (places where a window can start, width) for each array; the rows overlap in memory. Picking rows copies
        # whole windows, three times as fast as picking tokens.
        self._rows = [
            np.lib.stride_tricks.sliding_window_view(array, width) if len(array) >= width else None
            for array in self._arrays
        ]

    def locate(self, starts: NDArray[np.int64]) -> Places:
        """Where the windows are that start at these tokens, counted over all arrays."""
        arrays = np.searchsorted(self._first, starts, side="right") - 1
        crossing = starts + self.width > self._first[arrays + 1]
        return Places(np.where(crossing, ~arrays, arrays), starts - self._first[arrays])

    def read(self, places: Places) -> NDArray[np.int64]:
        """(windows, width) int64; zeros after the last token of all."""
        numbers = places.arrays.tolist()
        only = numbers[0]
        if only >= 0 and numbers.count(only) == len(numbers):
            rows = self._rows[only]
            assert rows is not None, "a window that does not run past its array's end fits in it"
            return rows[places.offsets].astype(np.int64)
        windows = np.empty((len(numbers), self.width), dtype=np.int64)
        for window, number, offset in zip(windows, numbers, places.offsets.tolist(), strict=True):
            if number >= 0:
                window[:] = self._arrays[number][offset : offset + self.width]
            else:
                self._copy(window, ~number, offset)
        return windows

    def _copy(self, window: NDArray[np.int64], number: int, offset: int) -> None:
        """Fill a window from as many arrays as it takes."""
        done = 0
        while done < self.width and number < len(self._arrays):
            piece = self._arrays[number][offset : offset + self.width - done]
            window[done : done + len(piece)] = piece
            done += len(piece)
            number, offset = number + 1, 0
        window[done:] = 0

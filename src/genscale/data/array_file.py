"""``.npy`` files written piece by piece, one alone or as the shards of a long array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np


class ArrayFile:
    """A ``.npy`` file written piece by piece: the number of its rows is put into the header at the end.

    Args:
        path: the file.
        dtype: of the values.
        row: shape of one row; () for an array of one dimension.
    """

    def __init__(self, path: Path, dtype: np.dtype, row: tuple[int, ...] = ()):
        self.path = path
        self.dtype = np.dtype(dtype)
        self.row = row
        self.length = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by finish)
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Give the file up unfinished."""
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that the length may grow in place: every length gives a header of equal size
        shape = (self.length, *self.row)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class ShardFiles:
    """One long array in files ``<name>-00000.npy``, ``<name>-00001.npy``, ... of equal length but for the last.

    Args:
        folder: where they are.
        name: what their names begin with.
        dtype: of the values.
        length: rows in each file but the last.
        row: shape of one row.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, length: int, row: tuple[int, ...] = ()):
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.shard_length = length
        self.row = row
        self._files: list[ArrayFile] = []

    @property
    def names(self) -> list[str]:
        return [file.path.name for file in self._files]

    @property
    def length(self) -> int:
        """Rows in all files."""
        return sum(file.length for file in self._files)

    def append(self, values: np.ndarray) -> None:
        written = 0
        while written < len(values):
            if not self._files or self._files[-1].length == self.shard_length:
                if self._files:
                    self._files[-1].finish()
                path = self.folder / f"{self.name}-{len(self._files):05d}.npy"
                self._files.append(ArrayFile(path, self.dtype, self.row))
            piece = values[written : written + self.shard_length - self._files[-1].length]
            self._files[-1].append(piece)
            written += len(piece)

    def finish(self) -> None:
        if self._files:
            self._files[-1].finish()

    def close(self) -> None:
        """Give the files up unfinished."""
        for file in self._files:
            file.close()

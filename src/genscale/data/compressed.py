"""Compressed files, by their ending: decompressed as they are read, an early end or damage always an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import BinaryIO, cast

import zstandard

_ENDINGS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}

DAMAGE = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError)
"""What reading a damaged stream raises; bz2 raises a plain OSError, see :func:`is_damage`."""


def is_damage(error: BaseException) -> bool:
    """Whether the error says that a compressed stream is damaged, rather than that it could not be read."""
    return isinstance(error, DAMAGE) or (type(error) is OSError and error.errno is None)


def split_ending(path: str) -> tuple[str, str | None]:
    """("notes.txt", "gz") for "notes.txt.gz"."""
    for ending, name in _ENDINGS.items():
        if path.lower().endswith(ending):
            return path[: -len(ending)], name
    return path, None


def reader(raw: BinaryIO, compression: str) -> BinaryIO:
    """The decompressed bytes of ``raw``; closing it closes ``raw``."""
    if compression == "zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    opened: io.BufferedIOBase
    if compression == "gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif compression == "bz2":
        opened = bz2.BZ2File(raw)
    else:
        opened = lzma.LZMAFile(raw)  # noqa: SIM115 (closed with the reader)
    return cast(BinaryIO, _Closing(opened, raw))


class _Closing(io.BufferedReader):
    """The standard decompressors leave the file below them open."""

    def __init__(self, opened: io.BufferedIOBase, raw: BinaryIO):
        super().__init__(opened, 1 << 20)  # type: ignore[arg-type]
        self._below = raw

    def close(self) -> None:
        super().close()
        self._below.close()


class _Zstandard(io.RawIOBase):
    """All frames of a zstd stream. (zstandard's own stream reader takes a stream that ends early for a whole one.)"""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._ready = memoryview(b"")
        self._waiting = b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            # Small bites, because a kilobyte may hold megabytes.
            chunk = self._waiting or self._raw.read(1 << 14)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._waiting = b""
            if self._frame.eof:
                self._waiting, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        super().close()
        self._raw.close()

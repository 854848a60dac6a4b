"""Files of other machines: listed and opened through fsspec, their errors made the user's."""

from __future__ import annotations

import errno
import io
import shutil
import tempfile
from typing import Any, BinaryIO, cast

HTTP = ("http", "https")
BUFFER = 1 << 20


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def find(url: str) -> tuple[str, Any, list[dict[str, Any]]]:
    """The files that a URL names (a file, a folder, or a glob): their common root, the file system, their entries.

    An entry has ``name``, ``size`` (or None) and what else the file system knows. Raises what the file system raises.
    """
    import fsspec

    system, place = fsspec.core.url_to_fs(url)
    http = url.split("://", 1)[0] in HTTP
    if "*" in url:
        entries = [entry for entry in system.glob(place, detail=True).values() if entry["type"] == "file"]
        root = place.split("*", 1)[0].rpartition("/")[0]
        if http:  # the pages that list files know nothing of them
            entries = [{**system.info(entry["name"]), "name": entry["name"]} for entry in entries]
    elif not http and system.isdir(place):
        entries = list(system.find(place, detail=True).values())
        root = place
    else:
        entries = [{**system.info(place), "name": place}]
        root = place.rpartition("/")[0]
    return root.rstrip("/") + "/", system, entries


def has_ranges(url: str, entry: dict[str, Any]) -> bool:
    """Whether a file can be read from any place: everywhere but on simple web servers."""
    return url.split("://", 1)[0] not in HTTP or bool(entry.get("partial"))


def version(entry: dict[str, Any]) -> str:
    """What changes when the file does, if the file system tells."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    return next((str(entry[key]) for key in keys if entry.get(key)), "")


def opened(url: str, seek: bool, ranges: bool) -> BinaryIO:
    """The file's bytes; with ``seek`` from any place, for which a file without ranges is fetched to the disk first."""
    import fsspec

    streamed = url.split("://", 1)[0] in HTTP and not (seek and ranges)
    file = fsspec.open(url, "rb", **({"block_size": 0} if streamed else {})).open()
    stream = cast(BinaryIO, io.BufferedReader(_Reading(file), BUFFER))
    if not seek or ranges:
        return stream
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with stream:
        shutil.copyfileobj(stream, copy, BUFFER)
    copy.seek(0)
    return cast(BinaryIO, copy)


class _Reading(io.RawIOBase):
    """A file of fsspec, whose many kinds of errors become OSError."""

    def __init__(self, file: Any):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            content = self._file.read(len(buffer))
        except Exception as error:
            raise OSError(errno.EIO, reason(error)) from error
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        super().close()
        self._file.close()

"""What a full or read-only disk says to the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genscale.runtime.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose a directory that can be written",
    errno.EACCES: "permission denied; choose a directory that can be written",
    errno.EPERM: "permission denied; choose a directory that can be written",
}


def disk_error(error: OSError, path: Path) -> UserError | None:
    """One line for a failure that is the disk's and not ours; None for any other."""
    reason = _REASONS.get(error.errno or 0)
    return UserError(f"cannot write {path}: {reason}") if reason else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writes to ``path``: a full disk, a read-only one and missing rights become a UserError."""
    try:
        yield
    except OSError as error:
        explained = disk_error(error, path)
        if explained is None:
            raise
        raise explained from error

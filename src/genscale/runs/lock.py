"""One process at a time in a run directory.

The lock is the kernel's (``flock``), so it goes with the process that holds it, however that process ends. The file
holds the holder's pid and host only to tell others who it is.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genscale.runs.disk import writing
from genscale.runtime.errors import UserError


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold ``directory/lock``; raises UserError while another process, or another part of this one, holds it."""
    path = directory / "lock"
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "just starting"
            raise UserError(f"another process ({holder}) is using {directory}") from None
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # closing frees the lock

"""How the C library hands out memory on a CPU."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the process keep memory that tensors free, for the next step's tensors.

    By default glibc gives large blocks back to the system at once and asks for them anew, page by page, in every step:
    about 35,000 page faults a step for a 10M-parameter model, against 120 (docs/experiments.md). Other C libraries are
    left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)

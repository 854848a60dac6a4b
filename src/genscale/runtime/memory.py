"""Out of memory: one line that says which rank, where, how much there was, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from genscale.runtime.device import memory_free, memory_used
from genscale.runtime.errors import UserError
from genscale.runtime.world import current_world

_CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: (not enough|can't allocate) memory", re.IGNORECASE)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(\w+)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_CPU_ALLOCATOR.search(str(error)))


@contextmanager
def explained_memory(device: torch.device, place: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory into a UserError; the run's watch ends the other ranks.

    Args:
        place: where the work was, such as :attr:`genscale.runtime.watch.Watch.place` says.
        advice: what to change so that it fits: ``layout.micro_batch: 8 -> 4``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(error, device, place(), advice())) from None


def _message(error: BaseException, device: torch.device, place: str, advice: str) -> str:
    world = current_world()
    who = f"rank {world.rank} ran" if world.size > 1 else "ran"
    asked = _ASKED.search(str(error))
    more = f"{_size(asked[1], asked[2])} more were asked for, " if asked else ""
    had = f"the process held at most {_gigabytes(memory_used(device))}, {_gigabytes(memory_free(device))} were free"
    return f"{who} out of memory on {device} in {place}: {more}{had}; to make it fit: {advice}"


def _size(number: str, unit: str) -> str:
    return _gigabytes(float(number)) if unit == "bytes" else f"{number} {unit}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

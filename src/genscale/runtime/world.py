"""The processes of a run: which one this is, sums over all of them, and what they must agree on."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from genscale.runtime.errors import UserError
from genscale.runtime.flight import record_flight
from genscale.runtime.joining import Joined, SharedStore, StoreGone, join, seat_from_environment, seconds_from

Answer = TypeVar("Answer")


class World(NamedTuple):
    """This process's rank and the number of processes."""

    rank: int = 0
    size: int = 1


_joined: Joined | None = None
_shared: SharedStore | None = None
"""The main thread's; None where another library formed the group."""


def join_world(device: torch.device, flight: Path | None = None) -> World:
    """Join the process group that the environment describes as torchrun does; a lone process forms no group.

    ``GENSCALE_JOIN_SECONDS`` is how long the processes wait for each other (300), ``GENSCALE_COLLECTIVE_SECONDS`` how
    long one of them may keep the others waiting in a collective (600).

    Args:
        flight: where an accelerator's own watchdog is to leave the flight records of a hang.

    Raises:
        UserError: the same on all ranks that have met: the port is taken, ranks are missing.
    """
    global _joined, _shared
    if os.environ.get("WORLD_SIZE", "1") != "1" and not distributed.is_initialized():
        seat = seat_from_environment()
        _joined = join(seat, seconds_from("GENSCALE_JOIN_SECONDS", 300))
        _shared = _joined.store()
        backend = distributed.get_default_backend_for_device(device)
        timeout = timedelta(seconds=collective_seconds())
        if flight:
            record_flight(flight)
        if device.type != "cpu":
            # Its watchdog ends the process with a trace of many lines: the watch of the run is to speak first.
            timeout += timedelta(minutes=1)
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            distributed.init_process_group(
                # Checkpoints move CPU tensors between ranks, so that an accelerator's group carries gloo as well.
                "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}",
                store=_joined.groups_store(),
                rank=seat.rank,
                world_size=seat.size,
                timeout=timeout,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"rank {seat.rank} has found the others and cannot connect to all of them: {reason}; the hosts must "
                "reach each other at all ports, and GLOO_SOCKET_IFNAME names the network where there are several"
            ) from None
    return current_world()


def joined() -> Joined | None:
    """How this process found the others; None for a lone one, and where another library formed the group."""
    return _joined


def store() -> distributed.Store:
    """Keys and values that all ranks see, for what is no tensor."""
    base = _joined.groups_store() if _joined else distributed.distributed_c10d._get_default_store()
    return distributed.PrefixStore("shared", base)


def collective_seconds() -> float:
    """How long a rank waits for the others in a collective."""
    return seconds_from("GENSCALE_COLLECTIVE_SECONDS", 600)


def current_world() -> World:
    """The world as it is now."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()


def all_reduce_sum(tensors: Iterable[Tensor], world: World) -> None:
    """Sum each tensor over all ranks, in place; one collective for each dtype."""
    if world.size == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [piece.view_as(tensor) for piece, tensor in zip(pieces, group, strict=True)])


_answers = 0
"""Answers of rank 0 so far; the same number on all ranks."""


def from_rank_0(work: Callable[[], Answer]) -> Answer:
    """Rank 0 does the work while the others wait; all get what it returns, or its UserError.

    The work may take hours, as the preparation of a store does: the others do not wait in a collective, whose time is
    limited, but look again and again whether the answer is there.
    """
    global _answers
    if current_world().size == 1:
        return work()
    answer: list[Any] = [None]
    _answers += 1
    key = f"answer-{_answers}"
    if distributed.get_rank() == 0:
        try:
            answer = [work()]
        except UserError as error:
            answer = [error]
        if _shared:
            _shared.set(key)
    elif _shared:
        _wait_for(key, _shared)
    distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        answer[0].told = distributed.get_rank() != 0
        raise answer[0]
    return answer[0]


def _wait_for(key: str, store: SharedStore) -> None:
    """Until it is there. Where the store has gone or a rank has failed, the next collective tells."""
    pause = 0.001
    with suppress(StoreGone):
        while not store.has(key) and not store.has("failed"):
            time.sleep(pause)
            pause = min(pause * 1.3, 0.1)


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer."""
    if current_world().size == 1:
        return flag
    count = torch.tensor(int(flag))
    distributed.all_reduce(count)
    return count.item() > 0

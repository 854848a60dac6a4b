"""The processes of a run: which one this is, sums over all of them, and what they must agree on."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from genscale.runtime.errors import UserError

Answer = TypeVar("Answer")


class World(NamedTuple):
    """This process's rank and the number of processes."""

    rank: int = 0
    size: int = 1


def join_world(device: torch.device) -> World:
    """Join the process group that torchrun describes in the environment; a lone process forms no group."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        backend = distributed.get_default_backend_for_device(device)
        # Checkpoints move CPU tensors between ranks, so that an accelerator's group carries gloo as well.
        distributed.init_process_group("gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}")
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    return current_world()


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


def from_rank_0(work: Callable[[], Answer]) -> Answer:
    """Rank 0 does the work while the others wait; all get what it returns, or its UserError."""
    if current_world().size == 1:
        return work()
    answer: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            answer = [work()]
        except UserError as error:
            answer = [error]
    distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        answer[0].told = distributed.get_rank() != 0
        raise answer[0]
    return answer[0]


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer."""
    if current_world().size == 1:
        return flag
    count = torch.tensor(int(flag))
    distributed.all_reduce(count)
    return count.item() > 0

"""What a step sends to other ranks, by collective and mesh axis, and how much of it is spent waiting.

While a measurement runs, every operation passes through a dispatch mode, which sees all collectives wherever they come
from: our own, FSDP's, those of DTensor (compiled or not), sends of a pipeline, exchanges between experts, in the
backward as well. It costs some microseconds for each operation, so it is meant for one step of a run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(NamedTuple):
    """What one kind of collective along one axis sent in a step."""

    collective: str
    axis: str
    calls: int
    bytes: int
    """Sent by this rank, by the formulas for rings (Thakur et al. 2005)."""


_FORMULAS: dict[str, Callable[[int, int], float]] = {
    "all_reduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "all_gather": lambda size, ranks: size * (ranks - 1),
    "reduce_scatter": lambda size, ranks: size * (ranks - 1) / ranks,
    "all_to_all": lambda size, ranks: size * (ranks - 1) / ranks,
    "broadcast": lambda size, ranks: size * (ranks - 1) / ranks,
    "reduce": lambda size, ranks: size * (ranks - 1) / ranks,
    "gather": lambda size, ranks: size * (ranks - 1) / ranks,
    "scatter": lambda size, ranks: size * (ranks - 1) / ranks,
    "send": lambda size, ranks: size,
    "barrier": lambda size, ranks: 0,
}
"""From the bytes of what a rank puts in. Of those with a root: the mean over the ranks."""

_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    **{name: name for name in _FORMULAS},
}
"""By how the names of operations begin, in c10d and in its functional form."""

_INPUTS = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "scatter": 1, "gather": 1}
"""The argument that a rank puts in, where c10d has the output before it."""


class Traffic:
    """A measurement, while it runs and after.

    Attributes:
        seconds: how long it ran.
        waiting_seconds: in which this process stood still for others. None where an accelerator does the waiting: its
            streams wait for each other while the process goes on.
    """

    def __init__(self, axes: Mapping[frozenset[int], str]):
        self.seconds = 0.0
        self.waiting_seconds: float | None = 0.0
        self._axes = axes
        self._waits = 0
        self._calls: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])

    def table(self) -> list[Sent]:
        """The rows, most bytes first."""
        rows = [Sent(*key, int(calls), round(size)) for key, (calls, size) in self._calls.items()]
        return sorted(rows, key=lambda row: (-row.bytes, row.collective, row.axis))

    @property
    def bytes(self) -> int:
        """Sent by this rank in all."""
        return sum(row.bytes for row in self.table())

    @property
    def waiting(self) -> float | None:
        """The share of the time that was spent waiting."""
        return self.waiting_seconds / self.seconds if self.waiting_seconds is not None and self.seconds else None

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "sent": [row._asdict() for row in self.table()],
            "bytes": self.bytes,
            "seconds": self.seconds,
            "waiting_seconds": self.waiting_seconds,
        }

    def count(self, collective: str, group: ProcessGroup, tensors: Iterable[Tensor], splits: list[int]) -> None:
        """Take in one call."""
        ranks = distributed.get_process_group_ranks(group)
        tensors = list(tensors)
        size: float = sum(tensor.nbytes for tensor in tensors)
        if collective == "all_to_all" and splits:  # uneven: all but the own part is sent
            rows = sum(splits)
            sent = size * (rows - splits[distributed.get_group_rank(group, distributed.get_rank())]) / max(1, rows)
        else:
            sent = _FORMULAS[collective](int(size), len(ranks))
        row = self._calls[collective, self._axis(ranks)]
        row[0] += 1
        row[1] += sent
        if any(tensor.device.type != "cpu" for tensor in tensors):
            self.waiting_seconds = None

    def _axis(self, ranks: list[int]) -> str:
        among = frozenset(ranks)
        if among in self._axes:
            return self._axes[among]
        return "all" if len(among) == distributed.get_world_size() else "ranks " + ", ".join(map(str, sorted(among)))

    @contextmanager
    def stopwatch(self) -> Iterator[None]:
        """Within, this process waits; a wait inside a wait is one."""
        begun = time.perf_counter()
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if self.waiting_seconds is not None and not self._waits:
                self.waiting_seconds += time.perf_counter() - begun


@contextmanager
def measured_traffic(axes: Mapping[frozenset[int], str]) -> Iterator[Traffic]:
    """Measure what happens within.

    Args:
        axes: names for groups, by their global ranks: :func:`axes_of`.
    """
    traffic = Traffic(axes)
    begun = time.perf_counter()
    with (
        _timed(distributed.Work, "wait", traffic),
        _timed(AsyncCollectiveTensor, "trigger_wait", traffic),
        _Watch(traffic),
    ):
        yield traffic
    traffic.seconds = time.perf_counter() - begun


@contextmanager
def _timed(owner: type, name: str, traffic: Traffic) -> Iterator[None]:
    """Within, a method's time counts as waiting."""
    method = getattr(owner, name)

    def waiting(*args: Any, **kwargs: Any) -> Any:
        with traffic.stopwatch():
            return method(*args, **kwargs)

    setattr(owner, name, waiting)
    try:
        yield
    finally:
        setattr(owner, name, method)


def axes_of(*meshes: DeviceMesh) -> dict[frozenset[int], str]:
    """The groups that this rank is in, along each axis of the meshes; an earlier mesh's names come first."""
    axes: dict[frozenset[int], str] = {}
    for mesh in meshes:
        for name in mesh.mesh_dim_names or ():
            axes.setdefault(frozenset(distributed.get_process_group_ranks(mesh[name].get_group())), name)
    return axes


class _Watch(TorchDispatchMode):
    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they take themselves apart first, and what they do comes by here again
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].lstrip("_")
        if name == "wait_tensor":
            with self.traffic.stopwatch():
                return func(*args, **(kwargs or {}))
        collective = next((_NAMES[begin] for begin in sorted(_NAMES, reverse=True) if name.startswith(begin)), None)
        if collective is not None:
            native = func.namespace == "c10d"
            given = args[_INPUTS[collective]] if native and collective in _INPUTS else args[0]
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            splits = _splits_of(args) if collective == "all_to_all" else []
            self.traffic.count(collective, _group_of(args, kwargs or {}), tensors, splits)
        return func(*args, **(kwargs or {}))


def _group_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProcessGroup:
    """The group among an operation's arguments: boxed in c10d, by name in its functional form."""
    for value in reversed([*args, *kwargs.values()]):
        if isinstance(value, str):
            return distributed.distributed_c10d._resolve_process_group(value)  # type: ignore[arg-type]
        if isinstance(value, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(value)
            except RuntimeError:  # a boxed ReduceOp
                continue
    raise AssertionError("a collective without a group")


def _splits_of(args: tuple[Any, ...]) -> list[int]:
    """How many rows an uneven all-to-all sends to each rank: the last of its lists of numbers."""
    lists = [value for value in args if isinstance(value, list) and value and all(isinstance(n, int) for n in value)]
    return lists[-1] if lists else []

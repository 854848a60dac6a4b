"""The processes of a run as a grid with an axis for each way of sharing work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from genscale.recipe.layout import AXES, Axis
from genscale.runtime.world import World

DATA: tuple[Axis, ...] = ("replicate", "shard", "expert")
"""Along these, ranks have different samples."""
SUMMED: tuple[Axis, ...] = (*DATA, "context")
"""Along these, ranks have different parts of the batch, so that a weight's gradient is the sum over them."""


class Mesh:
    """Where this process stands among all.

    Args:
        sizes: ranks along each axis; those not named have one.
        device: where the ranks' tensors lie.
    """

    def __init__(self, sizes: dict[Axis, int], device: torch.device):
        self.sizes: dict[Axis, int] = {axis: sizes.get(axis, 1) for axis in AXES}
        self._named = tuple(axis for axis in AXES if self.sizes[axis] > 1)
        self._grid: DeviceMesh | None = None
        if self._named:
            shape = tuple(self.sizes[axis] for axis in self._named)
            self._grid = init_device_mesh(device.type, shape, mesh_dim_names=self._named)
        self._flat: dict[tuple[Axis, ...], DeviceMesh] = {}

    @classmethod
    def lone(cls) -> Mesh:
        """Of one process."""
        return cls({}, torch.device("cpu"))

    def size(self, *axes: Axis) -> int:
        """Ranks along the axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def rank(self, *axes: Axis) -> int:
        """This process's place along the axes together, the first of them outermost."""
        place = 0
        for axis in axes:
            own = self._grid.get_local_rank(axis) if self._grid is not None and axis in self._named else 0
            place = place * self.sizes[axis] + own
        return place

    def along(self, *axes: Axis) -> DeviceMesh:
        """A mesh of one dimension over the axes together. They must have more than one rank."""
        assert self._grid is not None
        named = tuple(axis for axis in AXES if axis in axes and self.sizes[axis] > 1)
        if len(named) == 1:
            return self._grid[named[0]]
        if named not in self._flat:
            self._flat[named] = self._grid[named]._flatten("_".join(named))
        return self._flat[named]

    def grid(self, *parts: Sequence[Axis]) -> DeviceMesh:
        """A mesh with a dimension for each of the parts, which are axes taken together; empty parts are left out."""
        assert self._grid is not None
        flat = [self.along(*part) for part in parts if self.size(*part) > 1]
        if len(flat) == 1:
            return flat[0]
        names = tuple(name for mesh in flat for name in mesh.mesh_dim_names or ())
        return self._grid[names]

    def lines(self, axis: Axis) -> list[list[int]]:
        """The global ranks of every line of ranks along an axis, in an order that all ranks find alike."""
        assert self._grid is not None
        return self._grid.mesh.movedim(self._named.index(axis), -1).flatten(0, -2).tolist()

    def group(self, *axes: Axis) -> distributed.ProcessGroup | None:
        """Of the ranks along the axes together; None where this one is alone."""
        return self.along(*axes).get_group() if self.size(*axes) > 1 else None

    @property
    def devices(self) -> DeviceMesh:
        """All ranks, with a dimension for each axis that has several."""
        assert self._grid is not None
        return self._grid

    @property
    def meshes(self) -> list[DeviceMesh]:
        """All ranks, and the axes that were taken together so far."""
        return [] if self._grid is None else [self._grid, *self._flat.values()]

    @property
    def data(self) -> World:
        """Among the ranks that have different samples."""
        return World(self.rank("group", *DATA), self.size("group", *DATA))

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return not self._named

    def sum(self, tensors: Sequence[Tensor], *axes: Axis) -> None:
        """Sum each tensor over the ranks along the axes, in place."""
        group = self.group(*axes)
        if group is not None:
            for tensor in tensors:
                distributed.all_reduce(tensor, group=group)

    def largest(self, value: float, *axes: Axis) -> float:
        """Of the values of the ranks along the axes."""
        tensor = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self.group(*axes))
        return tensor.item()

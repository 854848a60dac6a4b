"""Groups of ranks train apart and exchange weights every so many steps (DiLoCo, Douillard et al. 2023).

The groups share one set of weights. Each trains its own copy with the recipe's optimizer on its own part of the data;
the mean of how far the copies have come, the *outer gradient*, moves the shared weights by a step of Nesterov momentum,
and the groups go on from there (algorithm 1). In the streaming form (Douillard et al. 2025, algorithm 2) fragments of
the network take turns, and an exchange may go on behind some further steps.

Everything happens on local tensors: a rank that has a shard of a parameter exchanges it with the ranks that have the
same shard in the other groups. When something happens is a pure function of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from genscale.parallel.compression import packed, unpacked
from genscale.parallel.shards import alike, local
from genscale.recipe.low_communication import LowCommunication
from genscale.training.average import weights_replaced


class OuterOptimizer:
    """The weights that the groups share, and their exchanges.

    Args:
        parameters: of the network by name, whole or shards; they are trained between the exchanges, and moved by them.
        group: this rank and its counterparts in the other groups; None for one group.

    Attributes:
        shared: the weights that all groups share, by name: what is validated, exported and kept.
        bytes_sent: to other groups by this rank so far, by the usual ring formulas.
    """

    def __init__(self, parameters: dict[str, Tensor], options: LowCommunication, group: ProcessGroup | None):
        self.options = options
        self.group = group
        self.groups = distributed.get_world_size(group) if group is not None else 1
        self.fragments = fragments_of(list(parameters), options.fragments)
        self.bytes_sent = 0
        self.shared = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._momenta = {name: torch.zeros_like(weights) for name, weights in self.shared.items()}
        self._parameters = parameters
        self._under_way: dict[int, Callable[[], Tensor]] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Begin and end the exchanges that are due when ``step`` steps are done."""
        for number in range(len(self.fragments)):
            if self._due(number, step):
                self._begin(number)
        for number in range(len(self.fragments)):
            if number in self._under_way and self._due(number, step - self.options.overlap):
                self._end(number, self.options.mixing if self.options.overlap else 0.0)

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """At the end of training: exchange what was trained since the last exchange, so that nothing is lost."""
        for number in range(len(self.fragments)):
            if number in self._under_way:
                self._end(number, self.options.mixing)
            if self.options.overlap or not self._due(number, step):
                self._begin(number)
                self._end(number, 0.0)

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Within, the network holds the shared weights; after, this group's own again, to the bit."""
        own = [local(parameter) for parameter in self._parameters.values()]
        with weights_replaced(own, [local(weights) for weights in self.shared.values()]):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint, live, and alike on all groups; waits for exchanges that are under way."""
        flat = {f"shared.{name}": weights for name, weights in self.shared.items()}
        flat |= {f"momentum.{name}": momentum for name, momentum in self._momenta.items()}
        if self.options.overlap:
            for number, names in enumerate(self.fragments):
                if number in self._under_way:
                    outer = self._under_way[number]()
                    self._under_way[number] = partial(_known, outer)
                else:
                    outer = torch.zeros_like(_flat(self.shared[name] for name in names))
                for name, gradient in zip(names, self._pieces(number, outer), strict=True):
                    flat[f"under_way.{name}"] = alike(self.shared[name], gradient)
        return flat

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take over what :meth:`tensors` gave after ``step`` steps."""
        for name in self.shared:
            local(self.shared[name]).copy_(local(tensors[f"shared.{name}"]))
            local(self._momenta[name]).copy_(local(tensors[f"momentum.{name}"]))
        self._under_way.clear()
        for number, names in enumerate(self.fragments):
            if any(self._due(number, begun) for begun in range(max(1, step - self.options.overlap + 1), step + 1)):
                outer = _flat(tensors[f"under_way.{name}"] for name in names)
                self._under_way[number] = partial(_known, outer)

    def _due(self, number: int, step: int) -> bool:
        """Whether a fragment's exchange begins when ``step`` steps are done: the last at multiples of ``every``."""
        offset = self.options.every * (number + 1) // len(self.fragments)
        return step > 0 and (step - offset) % self.options.every == 0

    def _begin(self, number: int) -> None:
        """Send how far this group has come since the last exchange of a fragment."""
        names = self.fragments[number]
        pairs = [(local(self.shared[name]), local(self._parameters[name].detach())) for name in names]
        self._under_way[number] = self._mean([(shared - own).float().flatten() for shared, own in pairs])

    def _mean(self, parts: list[Tensor]) -> Callable[[], Tensor]:
        """Begin taking the mean over the groups; what is returned waits for it and gives it, flat."""
        if self.group is None:
            return partial(_known, torch.cat(parts))
        if self.options.bits == 32:
            flat = torch.cat(parts)
            work = distributed.all_reduce(flat, group=self.group, async_op=True)
            self.bytes_sent += 2 * (self.groups - 1) * flat.nbytes // self.groups

            def reduced() -> Tensor:
                work.wait()
                return flat.div_(self.groups)

            return reduced
        # Each parameter by itself, so that one that several ranks of a group have is rounded alike on all of them. The
        # sum of what was rounded is taken in float32: groups are few, so that each may send its own to all.
        pieces = [packed(part, self.options.bits) for part in parts]
        sent = torch.cat(pieces)
        received = [torch.empty_like(sent) for _ in range(self.groups)]
        work = distributed.all_gather(received, sent, group=self.group, async_op=True)
        self.bytes_sent += (self.groups - 1) * sent.nbytes

        def gathered() -> Tensor:
            work.wait()
            return torch.stack([self._unpacked(each, parts, pieces) for each in received]).mean(0)

        return gathered

    def _unpacked(self, sent: Tensor, parts: list[Tensor], pieces: list[Tensor]) -> Tensor:
        """A group's parts, flat."""
        received = sent.split([len(piece) for piece in pieces])
        return torch.cat(
            [unpacked(piece, self.options.bits, len(part)) for piece, part in zip(received, parts, strict=True)]
        )

    def _end(self, number: int, mixing: float) -> None:
        """Move a fragment's shared weights, as torch.optim.SGD with ``nesterov`` does, and this group's to them."""
        options = self.options
        outer = self._under_way.pop(number)()
        for name, gradient in zip(self.fragments[number], self._pieces(number, outer), strict=True):
            shared, momentum, own = (local(table[name]) for table in (self.shared, self._momenta, self._parameters))
            momentum.mul_(options.outer_momentum).add_(gradient)
            shared.sub_(gradient.add(momentum, alpha=options.outer_momentum), alpha=options.outer_learning_rate)
            own.copy_(torch.lerp(shared, own, mixing) if mixing else shared)

    def _pieces(self, number: int, flat: Tensor) -> list[Tensor]:
        """A fragment's flat tensor, parameter by parameter."""
        parts = [local(self.shared[name]) for name in self.fragments[number]]
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def fragments_of(names: list[str], count: int) -> list[list[str]]:
    """Each parameter's name in one of at most ``count`` fragments of whole layers.

    Strided (Douillard et al. 2025, figure 2): neighbouring layers fall into different fragments. A layer is a numbered
    block, or a module outside the blocks.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbered = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        layer = parts[:-1] if numbered is None else parts[: numbered + 1]
        layers.setdefault(".".join(layer), []).append(name)
    fragments: list[list[str]] = [[] for _ in range(min(count, len(layers)))]
    for place, layer_names in enumerate(layers.values()):
        fragments[place % len(fragments)] += layer_names
    return fragments


def by_group(tensors: dict[str, Tensor], grid: DeviceMesh, axis: str) -> dict[str, Tensor]:
    """What differs between groups, for the checkpoint: views of the tensors with a first dimension for the groups.

    Each group then writes and reads its own part: (groups, *shape), of which this rank has (1, *shape).

    Args:
        grid: all ranks, with the axes that the tensors are sharded on.
        axis: the grid's axis along which the groups lie.
    """
    stacked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        axes, placements = _lies(tensor)
        mesh = grid[(axis, *axes)]
        stacked[name] = DTensor.from_local(
            local(tensor.detach())[None],
            mesh,
            [Shard(0), *placements],
            run_check=False,
            shape=torch.Size([mesh.size(0), *tensor.shape]),
            stride=(tensor.numel(), *tensor.stride()),
        )
    return stacked


def _lies(tensor: Tensor) -> tuple[tuple[str, ...], list[Placement]]:
    """The mesh axes of a tensor, and how it is split along them once it has one more dimension in front."""
    if not isinstance(tensor, DTensor):
        return (), []
    placements: list[Placement] = []
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard):
            placement = _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
        elif isinstance(placement, Shard):
            placement = Shard(placement.dim + 1)
        placements.append(placement)
    return tensor.device_mesh.mesh_dim_names or (), placements


def _known(flat: Tensor) -> Tensor:
    return flat


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([local(tensor.detach()).reshape(-1).float() for tensor in tensors])

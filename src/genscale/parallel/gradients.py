"""Gradients summed over the ranks that have different parts of a batch, while the backward still runs.

Gradients are put into buckets in the order in which the backward makes them; a full bucket is on its way while the next
one fills (Li et al. 2020, "PyTorch Distributed", section 3.2). Other than torch's DistributedDataParallel it sums and
does not average, works through any number of forwards and for penalties that differentiate twice, and asks no parameter
to take part in a phase.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from genscale.parallel.shards import local

_BUCKET_BYTES = 25 * 2**20
"""As in DistributedDataParallel."""


class Compressor(Protocol):
    """Sums a bucket over a group."""

    def start(self, bucket: int, flat: Tensor, shapes: list[torch.Size], group: ProcessGroup) -> Callable[[], None]:
        """Begin summing ``flat`` in place; what is returned waits for it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it remembers, for the checkpoint."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        ...


class PlainSum:
    """All of it, as it is."""

    def start(self, bucket: int, flat: Tensor, shapes: list[torch.Size], group: ProcessGroup) -> Callable[[], None]:
        work = distributed.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        return lambda: work.wait()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        pass


class GradientSum:
    """The sums of one network's gradients.

    Args:
        groups: for each parameter the groups over which its gradient is to be summed, one after the other.
        compressor: of what is sent.
    """

    def __init__(self, groups: dict[nn.Parameter, tuple[ProcessGroup, ...]], compressor: Compressor | None = None):
        self.compressor = compressor or PlainSum()
        self.waited = 0.0
        """Seconds spent waiting for sums that the backward did not cover."""
        self._buckets: list[list[nn.Parameter]] = []
        self._groups: list[tuple[ProcessGroup, ...]] = []
        by_group: dict[tuple[ProcessGroup, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter, wanted in groups.items():
            if wanted and parameter.requires_grad:
                by_group[wanted].append(parameter)
        for wanted, parameters in by_group.items():
            bucket: list[nn.Parameter] = []
            held = 0
            for parameter in reversed(parameters):  # about the order in which the backward gets to them
                size = local(parameter).nbytes
                if bucket and held + size > _BUCKET_BYTES:
                    self._buckets.append(bucket)
                    self._groups.append(wanted)
                    bucket, held = [], 0
                bucket.append(parameter)
                held += size
            self._buckets.append(bucket)
            self._groups.append(wanted)
        self._armed = False
        self._missing: list[int] = []
        self._flying: list[tuple[int, Tensor, list[Tensor], Callable[[], None]]] = []
        self._next = 0
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))

    def arm(self) -> None:
        """Before the last micro-batch's backward: from now on gradients that arrive are complete."""
        self._armed = True
        self._missing = [len(bucket) for bucket in self._buckets]

    def _arrived(self, number: int) -> None:
        if not self._armed:
            return
        self._missing[number] -= 1
        # In the buckets' order, so that all ranks send the same ones after each other.
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._launch(self._next)
            self._next += 1

    def _launch(self, number: int) -> None:
        gradients = [local(p.grad) for p in self._buckets[number] if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        first, *_ = self._groups[number]
        wait = self.compressor.start(number, flat, [gradient.shape for gradient in gradients], first)
        self._flying.append((number, flat, gradients, wait))

    def finish(self) -> None:
        """After the last backward: all gradients are summed when this returns. A parameter that took no part on this
        rank must have taken none on the others."""
        while self._next < len(self._buckets):
            self._launch(self._next)
            self._next += 1
        self._armed, self._next = False, 0
        for number, flat, gradients, wait in self._flying:
            wait()
            for group in self._groups[number][1:]:
                distributed.all_reduce(flat, group=group)
            pieces = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])
        self._flying.clear()

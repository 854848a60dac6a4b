"""Pipelines: the blocks lie one after the other on several ranks, and micro-batches flow through them.

Schedules and sends are torch's (``torch.distributed.pipelining``). Every rank reads the same micro-batches and prepares
their inputs itself, so that only the sequence (and the condition) travels, and the loss is taken where it is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from genscale.models.blocks import Stacked
from genscale.models.embedding import in_compute_dtype
from genscale.objectives.objective import Loss
from genscale.parallel.exchange import copied, scaled_gradient
from genscale.parallel.mesh import Mesh

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}

Work = tuple[dict[str, Any], Any]
"""A micro-batch's inputs of the network, and targets of the criterion."""


class Stage(nn.Module):
    """Some of a network's blocks, with what comes before the first and after the last of them.

    Args:
        network: pruned to what this stage has.
        number: of the stage.
        stages: in all.
        score: from the network's answer and a micro-batch's targets to a loss; called on the last stage.
        context: that it runs in, such as autocast.
    """

    def __init__(
        self,
        network: Stacked,
        number: int,
        stages: int,
        score: Callable[[Any, Any, bool], Loss],
        context: Callable[[], AbstractContextManager[object]],
    ):
        super().__init__()
        self.network = cast(nn.Module, network)
        self.context = context
        self.scale: Tensor | float = 1.0
        self.tokens: ProcessGroup | None = None
        """Ranks that share the tokens between the ends of the pipeline, so that each has a part of the gradient of the
        condition there."""
        self.first, self.last = number == 0, number == stages - 1
        self.work: Sequence[Work] = ()
        self.score = score
        self.losses: list[Loss] = []

    def forward(self, *flow: Tensor, number: Tensor) -> Any:
        """From the stage before to the next, or to the scaled loss: (1,). ``number`` is the micro-batch's."""
        inputs, targets = self.work[int(number)]
        with self.context():
            x, condition = self.through(flow, inputs)
            if condition is not None and self.tokens is not None:
                if self.first:
                    condition = copied(condition, self.tokens)
                if self.last:  # all ranks go on alike from here, and would have it as often as they are
                    condition = scaled_gradient(condition, 1 / self.tokens.size())
            if not self.last:
                return (x,) if condition is None else (x, condition)
            answer = cast(Any, self.network).leave(x, condition, **inputs)
            loss = self.score(answer, targets, self.training)
        self.losses.append(loss)
        return (loss.total * self.scale).reshape(1)

    def through(self, flow: tuple[Tensor, ...], inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        network = cast(Any, self.network)
        if self.first:
            x, condition = network.enter(**inputs)
        else:
            x, condition = flow[0], flow[1] if len(flow) > 1 else None
        return network.blocks(x, condition, network.around(x.dtype, **inputs)), condition


class Pipeline:
    """The stages on this rank, run together with those on the others.

    Args:
        stages: number to stage, of those on this rank.
        count: of all stages.
        schedule: the recipe's name of it.
        mesh: where this rank is.
        sequence: whether tokens are split over the mesh's tensor axis between layers.
        device: that the stages compute on.
    """

    def __init__(
        self, stages: dict[int, Stage], count: int, schedule: str, mesh: Mesh, sequence: bool, device: torch.device
    ):
        group = mesh.group("pipeline")
        assert group is not None
        self.stages, self.count, self.schedule, self.group, self.device = stages, count, schedule, group, device
        self._split = mesh.size("context") * (mesh.size("tensor") if sequence else 1)
        self._prepared: dict[tuple[Any, ...], Any] = {}
        self._names: dict[bool, list[str]] = {}

    def run(self, work: Sequence[Work], scale: Tensor | float) -> list[Loss]:
        """Forward and backward of all micro-batches; gradients are left in the stages.

        Args:
            work: of each micro-batch; all alike in shape.
            scale: that losses are multiplied by before the backward.

        Returns:
            The losses of the last stage; none on other ranks.
        """
        flow = self._flow(work[0][0])
        for stage in self.stages.values():
            stage.work, stage.losses, stage.scale = work, [], scale
            stage.train()
        key = (len(work), *(tuple(each.shape) for each in flow))
        schedule = self._prepared.get(key) or self._prepare(key, len(work), flow)
        numbers = torch.arange(len(work), device=self.device)
        positional = (numbers,) if 0 in self.stages else ()
        last = self.count - 1 in self.stages
        schedule.step(*positional, number=numbers, target=numbers if last else None, losses=[] if last else None)
        losses = [loss for stage in self.stages.values() if stage.last for loss in stage.losses]
        for stage in self.stages.values():
            stage.work, stage.losses = (), []
        return losses

    def score(self, inputs: dict[str, Any], targets: Any, training: bool = True) -> Loss:
        """In place of an objective's: one micro-batch through all stages, without gradients."""
        loss = self.forward_only(inputs, targets)
        return self.shared([] if loss is None else [loss], training)[0]

    def _flow(self, inputs: dict[str, Any]) -> list[Tensor]:
        """What flows from stage to stage: tensors without data."""
        stage = next(iter(self.stages.values()))
        network = cast(Any, stage.network)
        with stage.context():
            probe = in_compute_dtype(torch.empty(0, device=self.device))
        whole = network.around(probe.dtype, **inputs).masks[0].keys
        batch, width = len(next(iter(inputs.values()))), network.shape.width
        flow = [torch.empty(batch, whole // self._split, width, dtype=probe.dtype, device="meta")]
        if network.conditioned:
            flow.append(torch.empty(batch, width, dtype=probe.dtype, device="meta"))
        return flow

    def _prepare(self, key: tuple[Any, ...], micro_batches: int, flow: Sequence[Tensor]) -> Any:
        kind = _SCHEDULES[self.schedule]
        meta = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in flow]
        stages = []
        for number, module in self.stages.items():
            grows = [each.clone().requires_grad_(True) for each in meta]
            stages.append(
                PipelineStage(
                    module,
                    number,
                    self.count,
                    self.device,
                    input_args=(torch.empty(1, dtype=torch.long, device="meta"),) if number == 0 else tuple(grows),
                    output_args=torch.empty(1, device="meta", requires_grad=True) if module.last else tuple(grows),
                    group=self.group,
                )
            )
        options = {"loss_fn": lambda output, target: output.sum(), "scale_grads": False}
        single = issubclass(kind, PipelineScheduleSingle)
        schedule: PipelineScheduleSingle | PipelineScheduleMulti
        schedule = kind(stages[0] if single else stages, micro_batches, **options)
        self._prepared[key] = schedule
        return schedule

    @torch.no_grad()
    def forward_only(self, inputs: dict[str, Any], targets: Any) -> Loss | None:
        """One micro-batch through all stages without gradients; its loss on the rank of the last stage."""
        flow = self._flow(inputs)
        ranks = distributed.get_world_size(self.group)
        handed: tuple[Tensor, ...] = ()
        for number in range(self.count):
            if number not in self.stages:
                continue
            stage = self.stages[number]
            if number > 0 and ranks > 1:
                handed = tuple(torch.empty(each.shape, dtype=each.dtype, device=self.device) for each in flow)
                for each in handed:
                    distributed.recv(each, group=self.group, group_src=(number - 1) % ranks)
            stage.eval()
            stage.work, stage.losses, stage.scale = [(inputs, targets)], [], 1.0
            handed = stage(*handed, number=torch.tensor(0))
            if stage.last:
                return stage.losses[0]
            if ranks > 1:
                for each in handed:
                    distributed.send(each.contiguous(), group=self.group, group_dst=(number + 1) % ranks)
        return None

    def shared(self, losses: list[Loss], training: bool) -> list[Loss]:
        """The losses, on every rank of the pipeline by the same names: zeros where there are none."""
        if training not in self._names:
            names = [list(losses[0].metrics)] if losses else [None]
            last = (self.count - 1) % distributed.get_world_size(self.group)
            distributed.broadcast_object_list(
                names, src=distributed.get_global_rank(self.group, last), group=self.group, device=torch.device("cpu")
            )
            self._names[training] = cast(list[str], names[0])
        if losses:
            return losses
        zero = torch.zeros((), device=self.device)
        return [Loss(zero, dict.fromkeys(self._names[training], (zero, zero)))]


def prune(network: nn.Module, blocks: range, first: bool, last: bool) -> None:
    """Take away from a stacked network what a stage does not have; names stay what they are."""
    stacked = cast(Stacked, network)
    for name in list(stacked.blocks._modules):
        if int(name) not in blocks:
            del stacked.blocks._modules[name]
    kept = {*(stacked.first if first else ()), *(stacked.last if last else ())}
    head = getattr(network, "head", None)
    if last and head is not None and head.tied:
        kept.add("embedding")  # the head's weight; the first stage has it as well
    for name in {*stacked.first, *stacked.last} - kept:
        if getattr(network, name) is not None:
            setattr(network, name, None)


def split_evenly(costs: Sequence[float], before: float, after: float, stages: int) -> list[range]:
    """Blocks of each stage, in order, so that the dearest stage is as cheap as can be.

    Args:
        costs: of each block.
        before: cost of what comes before the first block, ``after``: after the last.
        stages: at most as many as there are blocks.
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def price(start: int, stop: int) -> float:
        return sums[stop] - sums[start] + before * (start == 0) + after * (stop == count)

    # best[s][i]: the least possible dearest of s stages over the first i blocks, and where its last stage begins.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, int]] = {}
        for stop in range(stage, count - (stages - stage) + 1):
            row[stop] = min((max(best[-1][start][0], price(start, stop)), start) for start in best[-1] if start < stop)
        best.append(row)
    ranges, stop = [], count
    for stage in range(stages, 0, -1):
        start = best[stage][stop][1]
        ranges.append(range(start, stop))
        stop = start
    return ranges[::-1]

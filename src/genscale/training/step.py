"""One phase of one step: the gradient of the whole global batch, and the update of the weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genscale.models.mixture import balance_step, begin_step, busiest_expert, loads, mixture_layers
from genscale.objectives.objective import Denoising, Loss, Phase
from genscale.parallel import fsdp
from genscale.parallel.mesh import DATA, SUMMED
from genscale.parallel.parallelize import Placed
from genscale.parallel.shards import local
from genscale.recipe.layout import AXES
from genscale.runtime.randomness import Rng
from genscale.runtime.world import all_reduce_sum
from genscale.training.job import Job
from genscale.training.plan import micro_batches
from genscale.training.precision import autocast
from genscale.training.schedules import learning_rate_factor


def accumulate(job: Job, phase: Phase, step: int) -> dict[str, float]:
    """Leave the phase's gradient over the global batch in ``.grad``; return its metrics and ``gradient_norm``.

    Totals are summed over micro-batches and ranks and divided by the global number of valid elements, which is known
    before the first forward; so accumulation, padding and uneven ranks cannot change the result.
    """
    objective, placed = job.objective, job.state.placed[phase.trains]
    if len(job.state.networks) > 1:
        for name, other in job.state.networks.items():
            other.requires_grad_(name == phase.trains)
    objective.train()
    slices, idle = own_slices(job)
    batches = [job.stream.batch_at(step, job.plan.batch, start, stop).to(job.device) for start, stop in slices]
    weight = torch.stack([objective.weight(phase, batch) for batch in batches[: len(batches) - idle]]).sum()
    job.watch.at(step, f"{phase.name}, weights", together=True)
    job.mesh.sum([weight], *DATA)
    begun = time.perf_counter()
    begin_step(placed.network, job.state.scaler.factor * job.mesh.size("group") / job.plan.batch)
    rngs = [Rng(job.recipe.seed, step, phase.name, batch.positions) for batch in batches]
    if placed.pipeline is not None:
        losses = _through_pipeline(job, placed, batches, rngs, weight)
    else:
        losses = _one_by_one(job, phase, placed, batches, rngs, weight, idle, objective.scalars(step / job.plan.steps))
    job.stragglers.observe(time.perf_counter() - begun)
    job.watch.at(step, f"{phase.name}, gradients", together=True)
    placed.gradients.finish()
    reshard(job)
    measured = _measured(job, placed, losses)
    job.watch.at(step, f"{phase.name}, update")
    return measured


def own_slices(job: Job) -> tuple[list[tuple[int, int]], int]:
    """This rank's micro-batches as positions in the global batch, and how many of the last are for nothing.

    Where networks exchange weights or tokens while they run, every rank goes through them equally often.
    """
    data, batch = job.mesh.data, job.plan.batch
    slices = micro_batches(batch, job.micro_batch, data.rank, data.size)
    idle = 0
    if job.mesh.size("shard", "expert") > 1:
        idle = len(micro_batches(batch, job.micro_batch, 0, data.size)) - len(slices)
        slices += [(0, min(job.micro_batch, batch))] * idle
    return slices, idle


def _one_by_one(
    job: Job,
    phase: Phase,
    placed: Placed,
    batches: Sequence[Any],
    rngs: Sequence[Rng],
    weight: Tensor,
    idle: int,
    scalars: dict[str, float],
) -> list[Loss]:
    """Forward and backward of each micro-batch; the losses of those that count."""
    losses = []
    for number, (batch, rng) in enumerate(zip(batches, rngs, strict=True)):
        job.watch.at(rng.step, f"{phase.name}, micro-batch {number + 1}")
        torch.manual_seed(rng.dropout_seed() + job.dropout_offset)
        last, counts = number + 1 == len(batches), number < len(batches) - idle
        for root in placed.roots:
            fsdp.collect(root, last, placed.keep)
        if last:
            placed.gradients.arm()
        if counts:
            losses.append(_forward_and_backward(job, phase, batch, rng, weight, scalars))
        else:
            with not_counted(placed.network):
                _forward_and_backward(job, phase, batch, rng, weight, scalars, factor=0.0)
    return losses


def _forward_and_backward(
    job: Job, phase: Phase, batch: Any, rng: Rng, weight: Tensor, scalars: dict[str, float], factor: float = 1.0
) -> Loss:
    with differentiable_kernels(phase):
        with autocast(job.precision, job.device):
            loss = job.objective.loss(phase, batch, rng, scalars)
        total = job.state.scaler.scale(loss.total / weight)
        (total if factor == 1 else total * factor).backward()
    return loss


def _through_pipeline(
    job: Job, placed: Placed, batches: Sequence[Any], rngs: Sequence[Rng], weight: Tensor
) -> list[Loss]:
    """Forward and backward of all micro-batches, several of them at once on different ranks."""
    objective, pipeline = cast(Denoising, job.objective), placed.pipeline
    assert pipeline is not None
    torch.manual_seed(rngs[0].dropout_seed() + job.dropout_offset)
    work = [objective.prepare(batch, rng) for batch, rng in zip(batches, rngs, strict=True)]
    return pipeline.shared(pipeline.run(work, job.state.scaler.factor / weight), training=True)


def _measured(job: Job, placed: Placed, losses: Sequence[Loss]) -> dict[str, float]:
    """The means of the losses' metrics over all ranks, and the norm of the gradient."""
    sums: dict[str, Tensor] = {}
    for loss in losses:
        for name, (total, count) in loss.metrics.items():
            pair = torch.stack([total.detach().float(), count.float()])
            sums[name] = sums[name] + pair if name in sums else pair
    gradients = {name: local(p.grad) for name, p in placed.network.named_parameters() if p.grad is not None}
    job.state.scaler.unscale(list(gradients.values()))
    table = torch.stack(list(sums.values())) / job.mesh.size("tensor")  # (metrics, 2); its ranks have the same
    all_reduce_sum([table], job.world)
    means = table[:, 0] / table[:, 1]
    if placed.split:
        squares = [norm.double().square() / placed.copies[name] for name, norm in _norms(gradients)]
        norm = torch.stack(squares).sum()
        job.mesh.sum([norm], *(axis for axis in AXES if axis != "group"))
        norm = norm.sqrt().to(table)
    else:
        norm = torch.nn.utils.get_total_norm(gradients.values())
    names = [*sums]
    if mixture_layers(placed.network):  # a pipeline's rank speaks of its own
        placed.loads = loads(placed.network)
        job.mesh.sum([placed.loads], *SUMMED)
        names.append("busiest_expert")
        means = torch.cat([means, busiest_expert(placed.loads).reshape(1).to(means)])
    *values, placed.norm = torch.cat([means, norm.reshape(1)]).tolist()  # the step's one wait
    largest = placed.norm if job.mesh.size("group") == 1 else job.mesh.largest(placed.norm, "group")
    return dict(zip(names, values, strict=True)) | {"gradient_norm": largest}


def _norms(gradients: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True) if gradients else ()


def reshard(job: Job) -> None:
    """Of every network: whole weights would be old ones after an update."""
    for placed in job.state.placed.values():
        for root in placed.roots:
            fsdp.reshard(root)


@contextmanager
def not_counted(network: nn.Module) -> Iterator[None]:
    """Within, what goes through the network for nothing leaves no trace in its experts' load and auxiliary losses."""
    layers = mixture_layers(network)
    before = [(layer.load.clone(), layer.auxiliary_scale) for layer in layers]
    for layer in layers:
        layer.auxiliary_scale = 0.0
    yield
    for layer, (load, scale) in zip(layers, before, strict=True):
        layer.load.copy_(load)
        layer.auxiliary_scale = scale


def differentiable_kernels(phase: Phase) -> AbstractContextManager[None]:
    """Fused attention has no second derivative: a phase that needs one uses plain matrix products."""
    return sdpa_kernel(SDPBackend.MATH) if phase.differentiates_twice else nullcontext()


def apply(job: Job, phase: Phase, step: int, gradient_norm: float) -> None:
    """Clip, set the learning rate by the clock, update, and clear the gradient."""
    placed, optimizer = job.state.placed[phase.trains], job.state.optimizers[phase.trains]
    parameters = dict(placed.network.named_parameters())
    parts = {name: part for name, part in job.state.parts[phase.trains].items() if parameters[name].grad is not None}
    gradients = [local(cast(Tensor, parameters[name].grad)) for name in parts]
    limit = job.recipe.training.gradient_clip
    if job.mesh.size("group") > 1:
        gradient_norm = placed.norm
    if limit is not None and gradient_norm > limit:
        torch._foreach_mul_(gradients, limit / gradient_norm)
    for part, gradient in zip(parts.values(), gradients, strict=True):
        part.grad = gradient
    factor = learning_rate_factor(job.recipe.training.schedule, step * job.plan.batch, job.plan.clock)
    for group in optimizer.param_groups:
        group["lr"] = group["base_learning_rate"] * factor
    optimizer.step()
    if placed.loads is not None:
        balance_step(placed.network, placed.loads)


def clear(job: Job) -> None:
    """Free all gradients."""
    for name, network in job.state.networks.items():
        network.zero_grad(set_to_none=True)
        for part in job.state.parts[name].values():
            part.grad = None

"""One phase of one step: the gradient of the whole global batch, and the update of the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genscale.objectives.objective import Phase
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
    world, objective = job.world, job.objective
    network = job.state.networks[phase.trains]
    if len(job.state.networks) > 1:
        for name, other in job.state.networks.items():
            other.requires_grad_(name == phase.trains)
    objective.train()
    batches = [
        job.stream.batch_at(step, job.plan.batch, start, stop).to(job.device)
        for start, stop in micro_batches(job.plan.batch, job.micro_batch, world.rank, world.size)
    ]
    scalars = objective.scalars(step / job.plan.steps)
    weight = torch.stack([objective.weight(phase, batch) for batch in batches]).sum()
    all_reduce_sum([weight], world)

    sums: dict[str, Tensor] = {}
    for batch in batches:
        rng = Rng(job.recipe.seed, step, phase.name, batch.positions)
        torch.manual_seed(rng.dropout_seed())
        with differentiable_kernels(phase):
            with autocast(job.precision, job.device):
                loss = objective.loss(phase, batch, rng, scalars)
            job.state.scaler.scale(loss.total / weight).backward()
        for name, (total, count) in loss.metrics.items():
            pair = torch.stack([total.detach().float(), count.float()])
            sums[name] = sums[name] + pair if name in sums else pair

    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    all_reduce_sum(gradients, world)
    job.state.scaler.unscale(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    table = torch.stack(list(sums.values()))  # (metrics, 2)
    all_reduce_sum([table], world)
    *means, gradient_norm = torch.cat([table[:, 0] / table[:, 1], norm.reshape(1)]).tolist()  # the step's one wait
    return dict(zip(sums, means, strict=True)) | {"gradient_norm": gradient_norm}


def differentiable_kernels(phase: Phase) -> AbstractContextManager[None]:
    """Fused attention has no second derivative: a phase that needs one uses plain matrix products."""
    return sdpa_kernel(SDPBackend.MATH) if phase.differentiates_twice else nullcontext()


def apply(job: Job, phase: Phase, step: int, gradient_norm: float) -> None:
    """Clip, set the learning rate by the clock, update, and clear the gradient."""
    network, optimizer = job.state.networks[phase.trains], job.state.optimizers[phase.trains]
    limit = job.recipe.training.gradient_clip
    if limit is not None and gradient_norm > limit:
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, limit / gradient_norm)
    factor = learning_rate_factor(job.recipe.training.schedule, step * job.plan.batch, job.plan.clock)
    for group in optimizer.param_groups:
        group["lr"] = group["base_learning_rate"] * factor
    optimizer.step()


def clear(job: Job) -> None:
    """Free all gradients."""
    for network in job.state.networks.values():
        network.zero_grad(set_to_none=True)

"""How many samples go through the networks at once."""

from __future__ import annotations

from typing import Literal

import torch

from genscale.objectives.objective import Objective
from genscale.runtime.device import memory_free
from genscale.runtime.errors import UserError
from genscale.runtime.world import World

# Taken, not measured: beyond this many rows at once matrix products are large enough to gain nothing more.
_ENOUGH_ROWS = {"cpu": 16_384}
_ENOUGH_ROWS_ACCELERATOR = 65_536
_ENOUGH_FLOPS = 1e11
"""Of work at once, whatever the rows: a small network's rows are cheap beside what each pass costs by itself. A DCGAN
on 28 pixels takes 2.3 ms for an image in passes of 64 and 3.0 in passes of 16, where rows alone would stop."""


def choose_micro_batch(
    requested: int | Literal["auto"],
    batch: int,
    objective: Objective,
    precision: str,
    device: torch.device,
    world: World,
    pipeline: int = 1,
    parts: int = 1,
) -> int:
    """Samples in one forward: as asked, or the most that is useful and fits in half of the free memory.

    Args:
        world: the ranks that share the batch.
        parts: that the weights, and what belongs to them, are split into.
        pipeline: ranks of a pipeline, which wants equal micro-batches, and as many as keep all of them busy.
    """
    share = batch // world.size
    if share < 1:
        raise UserError(f"training.batch: {batch} samples are fewer than the {world.size} ranks")
    if pipeline > 1:
        return _for_pipeline(requested, batch, world, pipeline)
    if requested != "auto":
        if requested > share:
            raise UserError(
                f"layout.micro_batch: {requested} samples are more than each rank's share of the batch, {share}"
            )
        return requested
    states = sum(16 * parameter.numel() for parameter in objective.parameters()) // parts  # with gradient, two moments
    free = (memory_free(device) - states) // 2
    fits = free // objective.activation_bytes_per_sample(4 if precision == "fp32" else 2)
    rows = _ENOUGH_ROWS.get(device.type, _ENOUGH_ROWS_ACCELERATOR)
    enough = max(rows // objective.rows_per_sample(), int(_ENOUGH_FLOPS / objective.flops_per_sample()))
    wanted = max(1, min(share, fits, enough))
    passes = -(-share // wanted)
    return -(-share // passes)  # equal passes


def _for_pipeline(requested: int | Literal["auto"], batch: int, world: World, pipeline: int) -> int:
    """Samples in each of equal micro-batches, equally many on every rank: a multiple of the pipeline's ranks."""
    share, rest = divmod(batch, world.size)
    fitting = (
        [] if rest else [size for size in range(1, share + 1) if share % size == 0 and share // size % pipeline == 0]
    )
    if not fitting:
        raise UserError(
            f"training.batch: {batch} samples are not a multiple of {world.size} x layout.pipeline ({pipeline}), as a "
            "pipeline's micro-batches must be"
        )
    if requested == "auto":
        busy = [size for size in fitting if share // size >= 4 * pipeline]  # a bubble of at most a fifth
        return max(busy) if busy else min(fitting)
    if requested not in fitting:
        raise UserError(
            f"layout.micro_batch: {requested} samples do not divide {batch} into equal micro-batches that keep a "
            f"pipeline of {pipeline} busy; {', '.join(map(str, fitting))} do"
        )
    return requested

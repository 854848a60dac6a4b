"""The learning rate as a pure function of samples seen: a factor on each group's base learning rate.

A step takes the factor at its middle, ``samples + samples_per_step / 2``. So the first step of a warm-up and the last
of a decay to zero both learn something, and the sum of the factors times the batch is the schedule's integral (midpoint
rule) whatever the batch.
"""

from __future__ import annotations

import math

from genscale.recipe.amount import Clock
from genscale.recipe.training import Schedule


def learning_rate_factor(schedule: Schedule, samples: int, clock: Clock) -> float:
    """The factor for the step that begins after ``samples``.

    With t the samples at the step's middle, W those of the warm-up, D of the decay and B of the budget: the factor is
    t / W while t < W, and then

    - ``constant``: 1;
    - ``linear``: from 1 at W down to ``final`` at B;
    - ``cosine``: half a cosine from 1 at W down to ``final`` at B (Loshchilov and Hutter 2017, equation 5);
    - ``warmup_stable_decay``: 1, then from B - D linearly down to ``final`` at B (Hu et al. 2024; Hägele et al. 2024);
    - ``inverse_sqrt``: sqrt(W / t) (Vaswani et al. 2017, equation 3, relative to its peak); without a warm-up, W is one
      step.

    ``final`` holds beyond B.

    Raises:
        ValueError: when the clock does not know the step or the budget, or the warm-up's unit.
    """
    if clock.samples_per_step is None or clock.samples_in_budget is None:
        raise ValueError("the schedule needs a clock that knows the samples in a step and in the budget")
    budget = clock.samples_in_budget
    warmup = schedule.warmup.samples(clock)
    now = samples + clock.samples_per_step / 2
    if now < warmup:
        return now / warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":
        return min(1.0, math.sqrt(max(warmup, clock.samples_per_step) / now))
    start = warmup if schedule.kind != "warmup_stable_decay" else max(warmup, budget - schedule.decay.samples(clock))
    progress = min(1.0, max(0.0, (now - start) / (budget - start))) if budget > start else 1.0
    down = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.final + (1 - schedule.final) * down

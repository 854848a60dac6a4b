"""A recipe's amounts as numbers, once the data and the number of ranks are known."""

from __future__ import annotations

from dataclasses import dataclass

from genscale.recipe.amount import Amount, Clock
from genscale.recipe.schema import Recipe
from genscale.recipe.training import ExponentialAverage, PowerAverage
from genscale.runtime.errors import UserError


@dataclass(frozen=True)
class Plan:
    """When things happen. The clock is samples seen; a step is ``batch`` of them."""

    batch: int
    """Samples in a step, over all ranks."""
    steps: int
    clock: Clock
    validate_every: int
    """Samples between validations, and so on for the others."""
    validation_windows: int | None
    checkpoint_every: int
    keep_every: int | None
    half_life: int | None
    """Of the exponential average of the weights, in samples; None for none."""
    snapshot_every: int | None
    """Between snapshots of the averages with power profiles; None for none."""

    def due(self, every: int, step: int) -> bool:
        """Whether a multiple of ``every`` samples is reached by the end of this step."""
        return (step + 1) * self.batch // every > step * self.batch // every


def make_plan(recipe: Recipe, samples_per_epoch: int) -> Plan:
    """Resolve the recipe's amounts; an interval is at least a step. Raises UserError for a budget of nothing."""
    training, tokens_per_sample = recipe.training, recipe.tokens_per_sample
    clock = Clock(tokens_per_sample=tokens_per_sample, samples_per_epoch=samples_per_epoch)
    batch = _positive("training.batch", training.batch, clock)
    clock = Clock(tokens_per_sample, batch, samples_per_epoch)
    budget = _positive("training.budget", training.budget, clock)
    steps = max(1, round(budget / batch))
    clock = Clock(tokens_per_sample, batch, samples_per_epoch, steps * batch)
    validation, checkpoints, average = training.validation, training.checkpoints, training.average
    return Plan(
        batch=batch,
        steps=steps,
        clock=clock,
        validate_every=max(batch, validation.every.samples(clock)),
        validation_windows=_at_least(1, validation.amount, clock),
        checkpoint_every=max(batch, checkpoints.every.samples(clock)),
        keep_every=_at_least(batch, checkpoints.keep_every, clock),
        half_life=_at_least(1, average.half_life, clock) if isinstance(average, ExponentialAverage) else None,
        snapshot_every=_at_least(batch, average.snapshot_every, clock) if isinstance(average, PowerAverage) else None,
    )


def _at_least(samples: int, amount: Amount | None, clock: Clock) -> int | None:
    return None if amount is None else max(samples, amount.samples(clock))


def _positive(key: str, amount: Amount, clock: Clock) -> int:
    samples = amount.samples(clock)
    if samples < 1:
        size = f" ({clock.tokens_per_sample} tokens)" if clock.tokens_per_sample else ""
        raise UserError(f"{key}: '{amount}' is less than one sample{size}")
    return samples


def micro_batches(batch: int, micro_batch: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """This rank's slices of the global batch's positions.

    Micro-batch k holds positions [k * micro_batch, ...) whatever the number of ranks, and ranks take turns: the same
    micro-batches, so the same noise, on any number of ranks.
    """
    starts = range(0, batch, micro_batch)[rank::ranks]
    return [(start, min(start + micro_batch, batch)) for start in starts]

"""The learning rate's factor against closed forms and against transformers' schedules."""

import math

import pytest
import torch
from transformers import optimization

from genscale.recipe.amount import Amount, Clock
from genscale.recipe.training import Schedule
from genscale.training.schedules import learning_rate_factor

STEPS, BATCH, WARMUP, DECAY = 80, 6, 10, 20
CLOCK = Clock(tokens_per_sample=4, samples_per_step=BATCH, samples_in_budget=STEPS * BATCH)
KINDS = ["constant", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt"]


def factors(kind: str, final: float = 0.0, warmup: int = WARMUP, steps: int = STEPS) -> list[float]:
    schedule = Schedule(kind=kind, warmup=Amount(warmup, "steps"), decay=Amount(DECAY, "steps"), final=final)
    return [learning_rate_factor(schedule, step * BATCH, CLOCK) for step in range(steps)]


def closed_form(kind: str, middle: float, final: float) -> float:
    """By the middle of the step, in steps."""
    if middle < WARMUP:
        return middle / WARMUP
    return {
        "constant": 1.0,
        "linear": final + (1 - final) * (STEPS - middle) / (STEPS - WARMUP),
        "cosine": final + (1 - final) * math.cos(math.pi / 2 * (middle - WARMUP) / (STEPS - WARMUP)) ** 2,
        "warmup_stable_decay": final + (1 - final) * min(1.0, (STEPS - middle) / DECAY),
        "inverse_sqrt": (WARMUP / middle) ** 0.5,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_each_schedule_equals_its_closed_form(kind, final):
    assert factors(kind, final) == pytest.approx([closed_form(kind, step + 0.5, final) for step in range(STEPS)])


def test_schedules_equal_those_of_transformers_at_the_middle_of_each_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    references = {
        "constant": optimization.get_constant_schedule_with_warmup(optimizer, WARMUP),
        "linear": optimization.get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "cosine": optimization.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "inverse_sqrt": optimization.get_inverse_sqrt_schedule(optimizer, WARMUP),
        "warmup_stable_decay": optimization.get_wsd_schedule(
            optimizer, WARMUP, DECAY, num_training_steps=STEPS, decay_type="linear"
        ),
    }
    for kind, reference in references.items():
        (factor,) = reference.lr_lambdas
        assert factors(kind) == pytest.approx([factor(step + 0.5) for step in range(STEPS)]), kind


def test_linear_and_cosine_equal_those_of_torch():
    """torch's count from the first step; so beginning half a step in, they give the middles."""
    for kind, make in [
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=2 * STEPS)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=2 * STEPS)),
    ]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        rates = []
        for _ in range(2 * STEPS):  # in half steps
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert factors(kind, warmup=0) == pytest.approx(rates[1::2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_the_budget_is_wasted(kind):
    assert min(factors(kind, final=0.0)) > 0


@pytest.mark.parametrize("kind", ["linear", "warmup_stable_decay"])
def test_the_integral_does_not_depend_on_the_batch(kind):
    schedule = Schedule(kind=kind, warmup=Amount(60, "samples"), decay=Amount(120, "samples"))
    budget = STEPS * BATCH
    integrals = []
    for batch in (BATCH, BATCH // 2):
        clock = Clock(samples_per_step=batch, samples_in_budget=budget)
        integrals.append(batch * sum(learning_rate_factor(schedule, now, clock) for now in range(0, budget, batch)))
    assert integrals[0] == pytest.approx(integrals[1])


def test_beyond_the_budget_the_final_factor_holds():
    for kind in ("linear", "cosine", "warmup_stable_decay"):
        assert factors(kind, final=0.2, steps=STEPS + 5)[-4:] == pytest.approx([0.2] * 4)


def test_warm_up_as_long_as_the_budget_only_rises():
    for kind in KINDS:
        rates = factors(kind, warmup=STEPS)
        assert rates == sorted(rates)
        assert max(rates) < 1


def test_without_warm_up_inverse_sqrt_starts_at_one():
    rates = factors("inverse_sqrt", warmup=0)
    assert rates[0] == 1.0
    assert rates[1:] == pytest.approx([(1 / (step + 0.5)) ** 0.5 for step in range(1, STEPS)])


def test_decay_longer_than_what_warm_up_leaves_begins_after_it():
    schedule = Schedule(kind="warmup_stable_decay", warmup=Amount(50, "%"), decay=Amount(80, "%"), final=0.0)
    assert learning_rate_factor(schedule, STEPS * BATCH // 2, CLOCK) == pytest.approx(1 - 0.5 / (STEPS / 2))


def test_a_clock_that_knows_no_budget_is_refused():
    with pytest.raises(ValueError, match="samples in a step and in the budget"):
        learning_rate_factor(Schedule(), 0, Clock(samples_per_step=4))

"""Samplers on a Gaussian mixture, whose paths are known in closed form: in one dimension the path keeps every point's
quantile, so that the exact end of a path is the quantile of the mixture there."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from genscale.objectives.noise_levels import DDPMNoise, EDMNoise, FlowNoise, one_by_one
from genscale.objectives.samplers import SAMPLERS
from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.runtime.randomness import Rng

SHARES = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([-0.8, 0.5], dtype=torch.float64)
STDS = torch.tensor([0.25, 0.4], dtype=torch.float64)
RNG = Rng(0, 0, "sample", torch.arange(1))


def components(level):
    """Means and standard deviations of the noised mixture."""
    return level.alpha * MEANS, (level.alpha**2 * STDS**2 + level.sigma**2).sqrt()


def mixture_denoiser(levels):
    """The expected image given x, (batch, 1, 1, 1), by Bayes' rule."""

    def denoise(x, step):
        level = levels[step]
        means, stds = components(level)
        scores = SHARES.log() - stds.log() - 0.5 * ((x[..., None] - means) / stds) ** 2
        each = MEANS + level.alpha * STDS**2 / stds**2 * (x[..., None] - means)
        return (scores.softmax(-1) * each).sum(-1)

    return denoise


def cumulative(x, level):
    means, stds = components(level)
    return (SHARES * torch.special.ndtr((x[..., None] - means) / stds)).sum(-1)


def quantiles(probabilities, level):
    low, high = (torch.full_like(probabilities, end) for end in (-1e3, 1e3))
    for _ in range(100):
        middle = (low + high) / 2
        below = cumulative(middle, level) < probabilities
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def flow_path(steps):
    return FlowNoise(FlowObjective()).at(torch.linspace(0.95, 0.1, steps + 1, dtype=torch.float64))


def edm_path(steps):
    sigmas = torch.linspace(8 ** (1 / 7), 0.1 ** (1 / 7), steps + 1, dtype=torch.float64) ** 7
    return EDMNoise(EDMObjective()).at(sigmas)


def ddpm_path(steps):
    schedule = DDPMNoise(DDPMObjective(steps=1024, noise_schedule="cosine"))
    return schedule.at(torch.linspace(960, 64, steps + 1).long())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm_solver_2m", 2)])
@pytest.mark.parametrize("path", [flow_path, edm_path, ddpm_path])
def test_error_falls_with_the_order_of_the_sampler(sampler, order, path):
    probabilities = torch.linspace(0.02, 0.98, 33, dtype=torch.float64).view(-1, 1, 1, 1)
    errors = []
    for steps in (56, 112, 224):
        levels = one_by_one(path(steps))[:-1]
        start, end = quantiles(probabilities, levels[0]), quantiles(probabilities, levels[-1])
        reached = SAMPLERS[sampler](mixture_denoiser(levels), start, levels, RNG)
        errors.append((reached - end).square().mean().sqrt().item())
    assert errors[0] > 1e-9  # far above rounding
    for error, half_the_step in pairwise(errors):
        assert math.log2(error / half_the_step) == pytest.approx(order, abs=0.2)


SCHEDULES = {
    "flow": FlowNoise(FlowObjective()),
    "edm": EDMNoise(EDMObjective()),
    "ddpm": DDPMNoise(DDPMObjective(noise_schedule="cosine")),
    "zero terminal": DDPMNoise(DDPMObjective(prediction="v", zero_terminal_snr=True)),
}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_solver_2m", "ancestral"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples_from_noise_are_of_the_mixture(sampler, schedule):
    steps = {"euler": 300, "ancestral": 300}.get(sampler, 60)
    levels = one_by_one(SCHEDULES[schedule].sampled(steps))
    rng = Rng(0, 0, "sample", torch.arange(4000))
    # Evenly spread starts, so that what is left is the sampler's own error; ancestral draws scatter by themselves.
    start = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).view(-1, 1, 1, 1)
    x = SAMPLERS[sampler](mixture_denoiser(levels), levels[0].sigma * start, levels, rng)
    distance = stats.kstest(
        x.flatten().numpy(), lambda at: cumulative(torch.as_tensor(at), levels[-1]).numpy()
    ).statistic
    assert distance < (0.03 if sampler == "ancestral" else 0.015)
    mean = (SHARES * MEANS).sum()
    variance = (SHARES * (STDS**2 + MEANS**2)).sum() - mean**2
    assert x.mean().item() == pytest.approx(mean.item(), abs=0.03)
    assert x.var().item() == pytest.approx(variance.item(), rel=0.05)


def test_euler_is_a_step_along_the_velocity_and_ddim_of_its_paper():
    x, image = torch.tensor([0.4]), torch.tensor([-0.2])
    flow = one_by_one(FlowNoise(FlowObjective()).at(torch.tensor([0.8, 0.5], dtype=torch.float64)))[:-1]
    velocity = (x - image) / 0.8
    expected = x + (0.5 - 0.8) * velocity
    torch.testing.assert_close(SAMPLERS["euler"](lambda x, step: image, x, flow, RNG), expected)

    schedule = DDPMNoise(DDPMObjective())
    steps = torch.tensor([700, 400])
    now, then = schedule.alpha_bar[steps].tolist()
    noise = (x - math.sqrt(now) * image) / math.sqrt(1 - now)
    expected = math.sqrt(then) * (x - math.sqrt(1 - now) * noise) / math.sqrt(now) + math.sqrt(1 - then) * noise
    found = SAMPLERS["ddim"](lambda x, step: image, x, one_by_one(schedule.at(steps))[:-1], RNG)
    torch.testing.assert_close(found, expected)


def test_heun_averages_the_slopes_at_both_ends():
    levels = one_by_one(EDMNoise(EDMObjective()).at(torch.tensor([2.0, 1.5], dtype=torch.float64)))[:-1]
    seen = []

    def denoise(x, step):
        seen.append((x.item(), step))
        return 0.3 * x

    found = SAMPLERS["heun"](denoise, torch.tensor([1.0], dtype=torch.float64), levels, RNG).item()
    first = 0.7 / 2.0  # Karras et al. 2022, algorithm 1: (x - D) / sigma
    ahead = 1.0 - 0.5 * first
    second = 0.7 * ahead / 1.5
    assert found == pytest.approx(1.0 - 0.5 * (first + second) / 2)
    assert seen == [(1.0, 0), (pytest.approx(ahead), 1)]


def test_ancestral_draws_from_the_posterior():
    """Ho et al. 2020, equation 7, for neighbouring steps."""
    schedule = DDPMNoise(DDPMObjective())
    step = 600
    levels = one_by_one(schedule.at(torch.tensor([step, step - 1])))[:-1]
    bar, before = schedule.alpha_bar[step].item(), schedule.alpha_bar[step - 1].item()
    alpha, beta = bar / before, 1 - bar / before
    x, image = 0.9, -0.4
    mean = math.sqrt(before) * beta / (1 - bar) * image + math.sqrt(alpha) * (1 - before) / (1 - bar) * x
    std = math.sqrt((1 - before) / (1 - bar) * beta)
    rng = Rng(0, 0, "sample", torch.arange(20_000))
    start = torch.full((20_000, 1, 1, 1), x, dtype=torch.float64)
    drawn = SAMPLERS["ancestral"](lambda x, step: torch.full_like(x, image), start, levels, rng)
    drawn = (drawn.flatten() - mean) / std
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3

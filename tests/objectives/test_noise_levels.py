"""Noise levels: the identities between image, noise and answer, and schedules and grids against their papers."""

import itertools
import math

import pytest
import torch
from scipy import stats

from genscale.objectives.noise_levels import (
    DDPMNoise,
    EDMNoise,
    FlowNoise,
    NoiseLevel,
    alpha_bar,
    one_by_one,
    spread_out,
)
from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.runtime.errors import UserError

SCHEDULES = {
    "flow": FlowNoise(FlowObjective()),
    "edm": EDMNoise(EDMObjective()),
    "epsilon": DDPMNoise(DDPMObjective()),
    "v": DDPMNoise(DDPMObjective(prediction="v", noise_schedule="cosine", zero_terminal_snr=True)),
    "x0": DDPMNoise(DDPMObjective(prediction="x0")),
}
UNIFORM = (torch.arange(64) + 0.5) / 64


@pytest.mark.parametrize("name", SCHEDULES)
def test_image_and_noise_come_back_from_what_was_mixed_and_what_is_answered(name):
    levels = SCHEDULES[name].learned(UNIFORM.double())
    image, noise = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here = spread_out(levels, image)
    x, answer = here.mix(image, noise), here.answer(image, noise)
    torch.testing.assert_close(here.image(x, answer), image, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(here.noise(x, image), noise, rtol=1e-8, atol=1e-8)


def test_answers_are_those_of_the_papers():
    image, noise, answer = torch.tensor(0.3), torch.tensor(-1.1), torch.tensor(0.7)
    flow = one_by_one(SCHEDULES["flow"].at(torch.tensor([0.2])))[0]
    assert flow.answer(image, noise).item() == pytest.approx(-1.4)  # the velocity
    assert flow.mix(image, noise).item() == pytest.approx(0.8 * 0.3 - 0.2 * 1.1)
    assert flow.told == pytest.approx(0.2)

    sigma, data = 1.7, 0.5
    edm = one_by_one(SCHEDULES["edm"].at(torch.tensor([sigma], dtype=torch.float64)))[0]
    x = edm.mix(image, noise)
    skip = data**2 / (sigma**2 + data**2)  # Karras et al. 2022, table 1
    out = sigma * data / math.sqrt(sigma**2 + data**2)
    assert edm.image(x, answer).item() == pytest.approx((skip * x + out * answer).item())
    assert edm.scale == pytest.approx(1 / math.sqrt(sigma**2 + data**2))
    assert edm.told == pytest.approx(math.log(sigma) / 4)

    at = torch.tensor([300])
    bar = SCHEDULES["epsilon"].alpha_bar[300].item()
    assert one_by_one(SCHEDULES["epsilon"].at(at))[0].answer(image, noise).item() == pytest.approx(-1.1)
    assert one_by_one(SCHEDULES["x0"].at(at))[0].answer(image, noise).item() == pytest.approx(0.3)
    v = one_by_one(DDPMNoise(DDPMObjective(prediction="v")).at(at))[0]
    # Salimans and Ho 2022, section 4
    assert v.answer(image, noise).item() == pytest.approx(math.sqrt(bar) * -1.1 - math.sqrt(1 - bar) * 0.3)


def test_edm_networks_see_and_answer_unit_variance():
    data = 0.37
    levels = EDMNoise(EDMObjective(sigma_data=data)).learned(UNIFORM.double())
    seen = levels.scale**2 * (levels.alpha**2 * data**2 + levels.sigma**2)
    answered = levels.image_part**2 * data**2 + levels.noise_part**2
    torch.testing.assert_close(seen, torch.ones_like(seen))
    torch.testing.assert_close(answered, torch.ones_like(answered))


@pytest.mark.parametrize("name", ["epsilon", "v", "x0"])
def test_ddpm_keeps_the_variance(name):
    levels = SCHEDULES[name].learned(UNIFORM.double())
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(64, dtype=torch.float64))


def test_linear_schedule_is_the_product_of_its_steps():
    ours = alpha_bar(DDPMObjective())
    bar = 1.0
    for step in range(1000):
        bar *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        assert ours[step].item() == pytest.approx(bar, rel=1e-6)
    assert ours[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # diffusers' DDPMScheduler


def test_cosine_schedule_has_the_signal_of_its_equation():
    """Nichol and Dhariwal 2021, equation 17, but for the last steps, where beta is limited to 0.999."""
    ours = alpha_bar(DDPMObjective(noise_schedule="cosine"))

    def signal(time):
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 1, 99, 499, 900, 998):
        assert ours[step].item() == pytest.approx(signal((step + 1) / 1000) / signal(0), rel=1e-9)
    assert ours[-1].item() == pytest.approx(ours[-2].item() * 1e-3)


@pytest.mark.parametrize("steps", [2, 5, 50, 4000])
def test_schedules_of_any_length_end_in_noise(steps):
    for kind in ("linear", "cosine"):
        bar = alpha_bar(DDPMObjective(noise_schedule=kind, steps=steps))
        assert (bar.diff() < 0).all()
        assert 0 < bar[-1] < 0.01


def test_zero_terminal_snr_leaves_nothing_at_the_end_and_the_beginning_alone():
    plain, rescaled = (alpha_bar(DDPMObjective(prediction="v", zero_terminal_snr=zero)) for zero in (False, True))
    assert rescaled[-1] == 0
    assert rescaled[0].item() == pytest.approx(plain[0].item())
    assert (rescaled.diff() < 0).all()
    roots = [bar[[0, 400, 999]].sqrt() for bar in (plain, rescaled)]  # an affine change of the root
    parts = [((root[1] - root[2]) / (root[0] - root[2])).item() for root in roots]
    assert parts[0] == pytest.approx(parts[1])


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_weighs_images_by_the_limited_snr_whatever_is_predicted(prediction):
    schedule = DDPMNoise(DDPMObjective(prediction=prediction, min_snr=5.0))
    levels = schedule.learned(UNIFORM.double())
    ratio = (levels.alpha / levels.sigma) ** 2
    assert (ratio > 5).any()
    assert (ratio < 5).any()
    # How far the image moves for an error of 1 in the answer.
    zero, one = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    moved = levels.image(zero, one).abs()
    torch.testing.assert_close(schedule.weight(levels), ratio.clamp(max=5.0) * moved**2)
    assert (DDPMNoise(DDPMObjective(prediction=prediction)).weight(levels) == 1).all()


def test_training_levels_have_the_distributions_that_the_recipe_names():
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    times = FlowNoise(FlowObjective(time_mean=0.4, time_std=1.3)).learned(uniform).sigma.double()
    assert stats.kstest((torch.logit(times) - 0.4) / 1.3, "norm").pvalue > 1e-3
    sigmas = EDMNoise(EDMObjective(noise_mean=-0.8, noise_std=1.6)).learned(uniform).sigma.double()
    assert stats.kstest((sigmas.log() + 0.8) / 1.6, "norm").pvalue > 1e-3
    even = FlowNoise(FlowObjective(times="uniform")).learned(uniform)
    assert torch.equal(even.sigma, uniform)
    steps = (DDPMNoise(DDPMObjective(steps=10)).learned(uniform).told * 10).round()
    assert stats.chisquare(torch.bincount(steps.long())).pvalue > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends_of_the_uniform_range_are_finite_and_more_of_it_is_more_noise(name):
    levels = SCHEDULES[name].learned(torch.tensor([0.0, 0.3, 0.6, 1 - 2.0**-24]))
    assert all(part.isfinite().all() for part in levels)
    assert ((levels.sigma / levels.alpha).diff() > 0).all()


def test_sampled_levels_are_those_of_the_papers():
    edm = EDMNoise(EDMObjective()).sampled(18)
    assert edm.sigma[[0, 1, -1]].tolist() == pytest.approx([80, 57.586, 0.002], rel=1e-4)
    assert EDMNoise(EDMObjective()).sampled(1).sigma.tolist() == pytest.approx([80])
    assert FlowNoise(FlowObjective()).sampled(4).sigma.tolist() == [1, 0.75, 0.5, 0.25]
    assert FlowNoise(FlowObjective(shift=3.0)).sampled(4).sigma.tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    ddpm = DDPMNoise(DDPMObjective()).sampled(10)
    assert (ddpm.told * 1000).tolist() == pytest.approx([999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    assert (DDPMNoise(DDPMObjective(steps=7)).sampled(7).told * 7).tolist() == pytest.approx([6, 5, 4, 3, 2, 1, 0])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999])
def test_sampling_goes_down_to_no_noise(name, steps):
    levels = one_by_one(SCHEDULES[name].sampled(steps))
    assert len(levels) == steps + 1
    assert (levels[-1].alpha, levels[-1].sigma) == (1, 0)
    ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in levels]
    assert all(one > two for one, two in itertools.pairwise(ratios))
    assert all(math.isfinite(number) for level in levels for number in level)


def test_more_steps_than_were_learned_are_refused():
    with pytest.raises(UserError, match=r"101 are more than the model learned \(objective.steps: 100\)"):
        DDPMNoise(DDPMObjective(steps=100)).sampled(101)


def test_levels_of_a_batch_are_spread_over_its_images():
    images = torch.zeros(5, 3, 2, 2, dtype=torch.float64)
    here = spread_out(SCHEDULES["flow"].learned(torch.rand(5)), images)
    assert isinstance(here, NoiseLevel)
    assert {part.shape for part in here} == {(5, 1, 1, 1)}
    assert {part.dtype for part in here} == {torch.float64}

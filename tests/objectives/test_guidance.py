"""Guidance and inpainting: what they do to a denoiser."""

import pytest
import torch

from genscale.objectives.guidance import Condition, away_from, classifier_free, keeping, only_where
from genscale.objectives.noise_levels import DDPMNoise, EDMNoise, FlowNoise, one_by_one
from genscale.objectives.samplers import SAMPLERS
from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.runtime.randomness import Rng

X = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_classifier_free_guidance_is_linear_and_asks_once_for_both():
    calls = []

    def model(x, step, condition):
        calls.append(len(x))
        return x * (1 + condition.labels.view(-1, 1, 1, 1)) + step

    labels, nothing = torch.tensor([0, 1, 2]), torch.full((3,), 5)
    of = {label: model(X, 4, Condition(torch.tensor(label).expand(3), None)) for label in (0, 1, 2, 5)}
    conditional = torch.stack([of[0][0], of[1][1], of[2][2]])
    calls.clear()
    for guidance in (0.0, 1.0, 2.5, 7.0):
        guided = classifier_free(model, Condition(labels, None), Condition(nothing, None), guidance)
        torch.testing.assert_close(guided(X, 4), of[5] + guidance * (conditional - of[5]))
    assert calls == [6] * 4


def test_captions_are_doubled_too():
    captions = torch.tensor([[1, 2], [3, 0], [4, 4]])
    guided = classifier_free(
        lambda x, step, condition: x * condition.captions.sum(1).view(-1, 1, 1, 1),
        Condition(None, captions),
        Condition(None, torch.zeros_like(captions)),
        3.0,
    )
    torch.testing.assert_close(guided(X, 0), 3 * X * captions.sum(1).view(-1, 1, 1, 1))


def test_autoguidance_goes_away_from_the_guide():
    guided = away_from(lambda x, step: 2 * x + step, lambda x, step: x - step, 3.0)
    torch.testing.assert_close(guided(X, 2), (X - 2) + 3 * (X + 4))


def test_guidance_acts_only_where_it_should():
    denoise = only_where([False, True, False], lambda x, step: x + 1, lambda x, step: x)
    assert [torch.equal(denoise(X, step), X) for step in range(3)] == [True, False, True]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "schedule",
    [
        FlowNoise(FlowObjective()),
        EDMNoise(EDMObjective()),
        DDPMNoise(DDPMObjective(prediction="v", zero_terminal_snr=True)),
    ],
    ids=["flow", "edm", "ddpm"],
)
def test_inpainting_keeps_known_pixels_and_has_them_at_every_level(sampler, schedule):
    levels = one_by_one(schedule.sampled(12))
    image = torch.rand(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    mask[..., 0] = 1
    known = mask.expand_as(image) == 0
    seen = []

    def model(x, step):
        level = levels[step]
        seen.append(((x - level.alpha * image) / level.sigma)[known])  # the noise of the known part
        return 0.1 * x + 0.2

    x = levels[0].mix(image, X)
    drawn = SAMPLERS[sampler](keeping(model, image, mask), x, levels, Rng(0, 0, "sample", torch.arange(3)))
    assert torch.equal(drawn[known], image[known])
    assert not torch.isclose(drawn[~known], image[~known]).any()
    if sampler == "ancestral":
        assert all(0.2 < noise.std() < 2.5 for noise in seen)
    else:
        for noise in seen:
            torch.testing.assert_close(noise, X[known], rtol=1e-6, atol=1e-6)


def test_a_soft_mask_mixes():
    image, mask = torch.zeros_like(X), torch.full((3, 1, 2, 2), 0.25, dtype=torch.float64)
    torch.testing.assert_close(keeping(lambda x, step: x, image, mask)(X, 0), 0.25 * X)

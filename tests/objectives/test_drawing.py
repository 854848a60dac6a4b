"""From a request to images, with a denoiser whose images are known: the data are normal, apart in each pixel."""

import pytest
import torch

from genscale.objectives.drawing import check, draw, guidance_acts, noised_steps
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.noise_levels import EDMNoise, FlowNoise, one_by_one
from genscale.objectives.samplers import SAMPLERS
from genscale.recipe.image_objective import EDMObjective, FlowObjective
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

SHAPE = (1, 2, 3)
MEANS = torch.tensor([[[-0.6, 0.1, 0.9], [0.0, -0.3, 0.4]]])
STD = 0.2
STEPS = 20


def images(request, positions, guided=None, schedule=None, seed=0):
    levels = one_by_one((schedule or FlowNoise(FlowObjective())).sampled(request.steps))

    def denoise(x, step):
        alpha, sigma = levels[step].alpha, levels[step].sigma
        return MEANS + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEANS)

    rng = Rng(seed, 0, "sample", positions)
    return draw(denoise, guided, levels, request, SHAPE, rng, torch.device("cpu"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_the_same_in_any_batch_and_another_for_another_seed(sampler):
    request = ImageRequest(sampler=sampler, steps=8)
    together = images(request, torch.arange(6))
    assert together.shape == (6, *SHAPE)
    alone = torch.cat([images(request, torch.tensor([number])) for number in range(6)])
    assert torch.equal(together, alone)
    assert torch.equal(images(request, torch.tensor([3, 1])), together[[3, 1]])
    assert not torch.isclose(images(request, torch.arange(6), seed=1), together).any()


def test_given_noise_takes_the_place_of_the_seed():
    noise = torch.randn(2, *SHAPE)
    request = ImageRequest(sampler="heun", steps=STEPS, noise=noise)
    drawn = images(request, torch.arange(2))
    # The path of a normal distribution keeps the distance from its mean, in standard deviations.
    torch.testing.assert_close(drawn, MEANS + STD * noise, rtol=0, atol=0.02)
    assert torch.equal(images(request, torch.arange(2), seed=5), drawn)


@pytest.mark.parametrize("schedule", [FlowNoise(FlowObjective()), EDMNoise(EDMObjective())], ids=["flow", "edm"])
def test_less_strength_stays_nearer_to_the_image(schedule):
    """What is left of an image is what the path from the noised image says: a matter of closed form here."""
    image = torch.full((500, *SHAPE), 3.0)
    levels = one_by_one(schedule.sampled(100))
    left = []
    for strength in (0.2, 0.6, 1.0):
        request = ImageRequest(sampler="heun", steps=100, image=image, strength=strength)
        drawn = images(request, torch.arange(500), schedule=schedule)
        level = levels[100 - noised_steps(strength, 100)]
        narrowed = STD / (level.alpha**2 * STD**2 + level.sigma**2) ** 0.5
        expected = MEANS + level.alpha * narrowed * (image - MEANS)
        assert (drawn.mean(0) - expected[0]).abs().max() < 0.06
        left.append((drawn - MEANS).mean().item())
    assert left[0] > left[1] > left[2]
    assert left[2] == pytest.approx(0, abs=0.05)


def test_strength_is_the_share_of_steps_and_at_least_one():
    assert [noised_steps(strength, 20) for strength in (1.0, 0.5, 0.26, 0.001)] == [20, 10, 5, 1]


def test_guidance_acts_in_its_interval_whatever_the_strength():
    asked = []

    def guided(x, step):
        asked.append(step)
        return torch.zeros_like(x)

    image = torch.zeros(1, *SHAPE)
    for strength, expected in ((1.0, [5, 6, 7, 8, 9]), (0.6, [8, 9])):
        asked.clear()
        request = ImageRequest(
            sampler="euler", steps=20, guidance=2.0, guidance_interval=(0.25, 0.5), image=image, strength=strength
        )
        images(request, torch.arange(1), guided)
        assert asked == expected
    asked.clear()
    images(ImageRequest(sampler="euler", steps=20, guidance=2.0), torch.arange(1), guided)
    assert asked == list(range(20))
    assert guidance_acts((0.5, 1.0), 5) == [False, False, True, True, False]


def test_a_mask_keeps_what_is_known():
    image = torch.rand(4, *SHAPE)
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).expand(4, 1, 2, 3)
    drawn = images(ImageRequest(sampler="dpm_solver_2m", image=image, mask=mask), torch.arange(4))
    assert torch.equal(drawn[mask == 0], image[mask == 0])
    assert (drawn[mask == 1] != image[mask == 1]).all()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ImageRequest(sampler="huen"), "sampler: expected one of .*did you mean 'heun'"),
        (ImageRequest(steps=0), "steps: expected at least 1, not 0"),
        (ImageRequest(truncation=0.7), "truncation and latents are for GANs"),
        (ImageRequest(image=torch.zeros(2, *SHAPE), strength=0.0), "strength: expected above 0 and up to 1, not 0"),
        (ImageRequest(strength=0.5), "strength: there is no image to start from"),
        (ImageRequest(mask=torch.zeros(2, 1, 2, 3)), "mask: there is no image to start from"),
        (ImageRequest(image=torch.zeros(2, 1, 4, 4)), "image: expected 2 x 1 x 2 x 3, not 2 x 1 x 4 x 4"),
        (ImageRequest(noise=torch.zeros(1, *SHAPE)), "noise: expected 2 x 1 x 2 x 3, not 1 x 1 x 2 x 3"),
        (ImageRequest(labels=torch.zeros(3)), "labels: expected one for each of 2 images, not 3"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    with pytest.raises(UserError, match=message):
        check(request_, 2, SHAPE)

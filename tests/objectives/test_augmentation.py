"""Augmentation: exact where it can be, right where it interpolates, differentiable twice, told truly, and fair."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage, stats
from torch.nn import functional as F

from genscale.objectives import augmentation
from genscale.objectives.augmentation import AUGMENTATION_WIDTH, PARAMETERS, augment
from genscale.recipe.image_objective import Augmentation, FlowObjective
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

EVERYTHING = Augmentation(flip=True, rotate=180, translate=0.25, scale=0.2, colour=0.5, noise=0.1, cutout=0.5)
ALONE = {
    "flip": {"flip": True},
    "rotate": {"rotate": 30},
    "translate": {"translate": 0.3},
    "scale": {"scale": 0.3},
    "colour": {"colour": 0.4},
    "noise": {"noise": 0.2},
    "cutout": {"cutout": 0.4},
}


def pictures(batch, channels=3, height=8, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, channels, height, width, generator=generator, dtype=dtype) * 2 - 1


def rng(batch, step=0, first=0):
    return Rng(11, step, "train", torch.arange(first, first + batch))


def column(parameters, name):
    return parameters[:, PARAMETERS.index(name)]


# Geometry


def test_flips_are_exact_and_said():
    images = pictures(40, height=5, width=7)
    changed, parameters = augment(images, rng(40), Augmentation(flip=True), 1.0)
    flipped = column(parameters, "flip") == 1
    assert 8 < flipped.sum() < 32
    assert torch.equal(changed, torch.where(flipped[:, None, None, None], images.flip(3), images))
    assert not parameters[:, 1:].any()


def test_moves_are_whole_pixels_of_the_image_and_its_reflection():
    images = pictures(60, height=6, width=9)
    changed, parameters = augment(images, rng(60), Augmentation(translate=0.5), 1.0)
    down = (column(parameters, "down") * 3).round().long()
    right = (column(parameters, "right") * 4.5).round().long()
    assert (down.min(), down.max()) == (-3, 3)
    assert (right.min(), right.max()) == (-4, 4)
    # 4.5 pixels at most, but whole ones; each image is cut from itself with its reflection on every side.
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (6, 6), (9, 9)), mode="symmetric")
    for i in range(60):
        y, x = 6 - down[i], 9 - right[i]
        assert np.array_equal(changed[i].numpy(), padded[i, :, y : y + 6, x : x + 9])
        inside = torch.roll(images[i], (int(down[i]), int(right[i])), (1, 2))
        rows, columns = slice(max(0, down[i]), 6 + min(0, down[i])), slice(max(0, right[i]), 9 + min(0, right[i]))
        assert torch.equal(changed[i][:, rows, columns], inside[:, rows, columns])


@pytest.mark.parametrize("move", [-13, -6, -1, 0, 2, 6, 12, 25])
def test_moves_of_any_length_reflect_again_and_again(move):
    index = augmentation._reflected(torch.arange(6) - move, 6)
    expected = np.pad(np.arange(6), 30, mode="symmetric")[30 - move : 36 - move]
    assert index.tolist() == expected.tolist()


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quarter_turns_are_those_of_rot90(turns, dtype):
    images = pictures(3, height=7, width=7, dtype=dtype)
    angle = torch.full((3,), turns * math.pi / 2, dtype=torch.float64)
    grid = augmentation._grid(7, 7, angle.cos(), angle.sin(), torch.ones(3)).to(dtype)
    turned = augmentation._Resample.apply(images, grid)
    accuracy = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(turned, torch.rot90(images, turns, (2, 3)), rtol=0, atol=accuracy)


def test_turns_and_zooms_are_those_of_scipy():
    images = pictures(20, height=9, width=12, dtype=torch.float64)
    changed, parameters = augment(images, rng(20), Augmentation(rotate=180, scale=0.3), 1.0)
    cosine, sine = column(parameters, "cosine") + 1, column(parameters, "sine")
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(20))
    factor = torch.exp2(0.9 * column(parameters, "scale"))
    assert 2**-0.9 < factor.min() < 0.7 < 1.4 < factor.max() < 2**0.9
    centre = np.array([4.0, 5.5])
    for i in range(20):
        c, s, f = cosine[i].item(), sine[i].item(), factor[i].item()
        inverse = np.array([[c, s], [-s, c]]) / f  # from (down, right) in the result to (down, right) in the image
        offset = centre - inverse @ centre
        for channel in range(3):
            expected = ndimage.affine_transform(images[i, channel].numpy(), inverse, offset, order=1, mode="reflect")
            np.testing.assert_allclose(changed[i, channel].numpy(), expected, rtol=0, atol=2e-5)


def test_positive_angles_turn_counter_clockwise_and_factors_above_one_enlarge():
    image = torch.zeros(1, 1, 33, 33)
    image[0, 0, 16, 28] = 1  # 12 to the right of the centre
    angle = torch.tensor([math.pi / 6])
    grid = augmentation._grid(33, 33, angle.cos(), angle.sin(), torch.tensor([1.25]))
    turned = augmentation._Resample.apply(image, grid)[0, 0]
    down, right = divmod(int(turned.argmax()), 33)
    assert (down - 16, right - 16) == (round(-15 * math.sin(math.pi / 6)), round(15 * math.cos(math.pi / 6)))


def test_resampling_is_that_of_grid_sample():
    images, grid = pictures(4), torch.rand(4, 8, 8, 2, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    expected = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    assert torch.equal(augmentation._Resample.apply(images, grid), expected)


# Colour, noise, cutout


def test_colours_change_as_written():
    images = pictures(30)
    changed, parameters = augment(images, rng(30), Augmentation(colour=0.5), 1.0)
    brightness, contrast, saturation = (
        column(parameters, name)[:, None, None, None] * 0.5 for name in ("brightness", "contrast", "saturation")
    )
    lighter = (images.double() + brightness) * 2.0 ** contrast.double()
    grey = lighter.mean(1, keepdim=True)
    torch.testing.assert_close(
        changed.double(), grey + (lighter - grey) * 2.0 ** saturation.double(), rtol=0, atol=1e-6
    )


def test_grey_images_have_no_saturation_and_latents_no_colours():
    _, parameters = augment(pictures(30, channels=1), rng(30), Augmentation(colour=0.5), 1.0)
    assert column(parameters, "contrast").all()
    assert not column(parameters, "saturation").any()
    with pytest.raises(UserError, match=r"objective\.augmentation\.colour: latents of 4 channels have no colours"):
        augment(pictures(2, channels=4), rng(2), Augmentation(colour=0.5), 0.5)


def test_a_probability_that_adapts_needs_a_discriminator():
    with pytest.raises(ValidationError, match=r"augmentation\.target follows a discriminator"):
        FlowObjective(augmentation=Augmentation(target=0.6))


def test_noise_has_its_standard_deviation_and_differs_between_images():
    images = pictures(64, height=16, width=16)
    changed, parameters = augment(images, rng(64), Augmentation(noise=0.3), 0.5)
    noisy = column(parameters, "noise") == 1
    noise = (changed - images)[noisy]
    assert stats.kstest(noise.flatten().numpy() / 0.3, "norm").pvalue > 1e-3
    assert (noise[0] - noise[1]).abs().max() > 0.3
    assert torch.equal(changed[~noisy], images[~noisy])


@pytest.mark.parametrize("part", [0.01, 0.5, 1.0])
def test_cutout_is_a_grey_rectangle_around_the_pixel_that_is_said(part):
    images = pictures(50, height=8, width=12)
    changed, parameters = augment(images, rng(50), Augmentation(cutout=part), 1.0)
    rows = ((column(parameters, "cutout_down") + 1) * 4 - 0.5).round().long()
    columns = ((column(parameters, "cutout_right") + 1) * 6 - 0.5).round().long()
    assert set(rows.tolist()) == set(range(8))
    height, width = max(1, round(8 * part)), max(1, round(12 * part))
    for i in range(50):
        expected = images[i].clone()
        top, left = int(rows[i]) - height // 2, int(columns[i]) - width // 2
        expected[:, max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = 0
        assert torch.equal(changed[i], expected)


# Chance


@pytest.mark.parametrize("change", ALONE)
@pytest.mark.parametrize("probability", [0.2, torch.tensor(0.8)])
def test_each_change_has_the_probability_that_is_asked_for(change, probability):
    images = pictures(4000, height=4, width=4)
    changed, parameters = augment(images, rng(4000), Augmentation(**ALONE[change]), probability)
    p = float(probability)
    # Moves are of 1.2 pixels at most, rounded: 5 / 12 of those in a direction are none.
    chances = {"flip": p / 2, "translate": p * (1 - (5 / 12) ** 2), "colour": 1 - (1 - p) ** 3}
    touched = (changed != images).flatten(1).any(1)
    low, high = stats.binom.interval(1 - 1e-4, 4000, chances.get(change, p))
    assert low <= int(touched.sum()) <= high
    assert torch.equal(touched, parameters.any(1))


def test_changes_are_drawn_apart_and_evenly():
    _, parameters = augment(pictures(3000, height=4, width=4), rng(3000), EVERYTHING, 0.5)
    marks = ["flip", "sine", "scale", "brightness", "contrast", "saturation", "noise", "cutout"]
    happened = torch.stack([column(parameters, mark) != 0 for mark in marks]).double()
    correlation = torch.corrcoef(happened) - torch.eye(len(marks))
    assert correlation.abs().max() < 5 / math.sqrt(3000)
    for name in ("scale", "brightness", "contrast", "saturation"):
        amounts = column(parameters, name)
        amounts = amounts[amounts != 0]
        assert stats.kstest(amounts.numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3
    angles = torch.atan2(column(parameters, "sine"), column(parameters, "cosine") + 1)
    assert stats.kstest(angles[angles != 0].numpy() / math.pi, "uniform", args=(-1, 2)).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_parameters_are_zero_exactly_where_the_image_is_unchanged(probability):
    images = pictures(300)
    changed, parameters = augment(images, rng(300), EVERYTHING, probability)
    assert parameters.shape == (300, AUGMENTATION_WIDTH)
    assert parameters.dtype == torch.float32
    untold = ~parameters.any(1)
    assert torch.equal(untold, (changed == images).flatten(1).all(1))
    assert untold.sum() == {0.0: 300, 1.0: 0}.get(probability, untold.sum())
    assert parameters.abs().max() <= 2


def test_draws_depend_neither_on_the_micro_batch_nor_on_the_other_options():
    images = pictures(24)
    whole = augment(images, rng(24), EVERYTHING, 0.7)
    for sizes in ([12, 12], [5, 19], [1] * 24):
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        parts = [
            augment(images[start : start + size], rng(size, first=start), EVERYTHING, 0.7)
            for start, size in zip(starts, sizes, strict=True)
        ]
        for found, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
            assert torch.equal(found, expected)
    _, alone = augment(images, rng(24), Augmentation(flip=True, scale=0.2), 0.7)
    for name in ("flip", "scale"):
        assert torch.equal(column(alone, name), column(whole[1], name))


def test_another_step_or_name_draws_anew():
    images = pictures(24)
    first, _ = augment(images, rng(24), EVERYTHING, 1.0)
    again, _ = augment(images, rng(24), EVERYTHING, torch.tensor(1.0))
    assert torch.equal(first, again)
    for other in (
        augment(images, rng(24, step=1), EVERYTHING, 1.0),
        augment(images, rng(24), EVERYTHING, 1.0, "other"),
    ):
        assert ((other[0] - first).flatten(1).abs().amax(1) > 0.01).all()


# Derivatives


@pytest.mark.parametrize("options", [EVERYTHING, Augmentation(rotate=180, scale=0.3)], ids=["everything", "resampling"])
def test_derivatives_of_both_orders_are_those_of_finite_differences(options):
    images = pictures(2, height=4, width=5, dtype=torch.float64).requires_grad_()

    def changed(images):
        return augment(images, rng(2), options, 1.0)[0]

    def bent(images):  # a linear map has no second derivative of its own; that of what follows must come through
        return changed(images).sin()

    assert torch.autograd.gradcheck(changed, images)
    assert torch.autograd.gradcheck(bent, images)
    assert torch.autograd.gradgradcheck(bent, images)


def test_a_gradient_penalty_goes_through_to_the_discriminator():
    images = pictures(4, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def penalty(weight):
        changed, _ = augment(images, rng(4), EVERYTHING, 1.0)
        logits = (changed.flatten(1) * weight).sum(1).tanh()
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, weight)


def test_gradients_of_any_layout_come_back_in_the_dtype_of_the_images():
    for dtype in (torch.bfloat16, torch.float32):
        images = pictures(4, dtype=torch.float32).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        changed, _ = augment(images, rng(4), Augmentation(rotate=20, flip=True), 1.0)
        assert changed.dtype == torch.float32
        changed.sum().backward()  # an expanded gradient
        assert images.grad.dtype == dtype
        assert images.grad.sum().item() == pytest.approx(images.numel(), rel=1e-2)

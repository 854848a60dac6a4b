"""The distance that GANs are validated by: unbiased, independent of the batch, and smaller for what is closer."""

import pytest
import torch

from genscale.objectives.moment_distance import FOLDS, MomentSpace, folds, squared_distance
from genscale.runtime.randomness import Rng

SPACE = MomentSpace(1, 8)


def draw(count, seed, shift=0.0, scale=1.0):
    """Smooth images, so that neighbouring pixels belong together."""
    coarse = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    return (0.5 * scale * images + shift).clamp(-1, 1)


def sums(images, positions):
    return folds(Rng(0, 0, "validate", positions)).T.double() @ SPACE.features(images).double()


def distance(real, fake):
    positions = torch.arange(len(real))
    counts = folds(Rng(0, 0, "validate", positions)).sum(0).double()
    return squared_distance(sums(real, positions), sums(fake, positions), counts)


def test_it_is_unbiased_at_any_number_of_images():
    for count in (20, 200):
        found = torch.tensor([distance(draw(count, 2 * i), draw(count, 2 * i + 1)) for i in range(60)])
        error = found.std() / len(found) ** 0.5
        assert abs(found.mean()) < 3 * error, "0 between equal distributions"
        assert (found < 0).any()


def test_it_is_the_mean_over_pairs_of_folds():
    real, fake = draw(40, 1), draw(40, 2, shift=0.5)
    positions = torch.arange(40)
    fold = folds(Rng(0, 0, "validate", positions)).argmax(1)
    of = {
        k: (SPACE.features(real[fold == k]) - SPACE.features(fake[fold == k])).double().mean(0)
        for k in set(fold.tolist())
    }
    products = [(of[i] @ of[j]).item() for i in of for j in of if i != j]
    assert distance(real, fake) == pytest.approx(sum(products) / len(products), rel=1e-5)


def test_it_grows_with_the_difference_of_the_distributions():
    real = draw(400, 1)
    shifts = [distance(real, draw(400, 2, shift=shift)) for shift in (0.0, 0.1, 0.3, 1.0)]
    assert shifts == sorted(shifts)
    scales = [distance(real, draw(400, 2, scale=scale)) for scale in (1.0, 0.7, 0.3, 0.0)]
    assert scales == sorted(scales)
    assert shifts[-1] > 20 * abs(shifts[0])


def test_it_sees_a_collapse_and_noise():
    real = draw(400, 1)
    good = distance(real, draw(400, 2))
    collapsed = distance(real, draw(1, 3).expand(400, -1, -1, -1))
    noise = torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * real.std() + real.mean()
    assert collapsed > 10 * abs(good)
    assert distance(real, noise) > 10 * abs(good)


def test_sums_do_not_depend_on_the_batch():
    images, positions = draw(30, 1), torch.arange(100, 130)
    whole = sums(images, positions)
    parts = sum(sums(images[i : i + 7], positions[i : i + 7]) for i in range(0, 30, 7))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_means_serve_as_well_as_sums():
    draws = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(FOLDS, 8, generator=draws, dtype=torch.float64) for _ in range(2))
    counts = torch.arange(FOLDS).double()  # the distance may come out near zero, of which float32 keeps few digits
    expected = squared_distance(real, fake, counts)
    assert squared_distance(real / 100, fake / 100, counts / 100) == pytest.approx(expected, rel=1e-6)


def test_a_fold_without_images_is_left_out_and_a_single_one_is_squared():
    counts = torch.zeros(FOLDS)
    counts[3] = 2
    real, fake = torch.zeros(FOLDS, 4), torch.zeros(FOLDS, 4)
    real[3] = 2
    assert squared_distance(real, fake, counts) == pytest.approx(4.0)


@pytest.mark.parametrize(("channels", "resolution"), [(1, 8), (3, 28), (4, 6), (1, 4), (3, 64)])
def test_features_have_length_1_at_any_shape_and_are_the_same_every_time(channels, resolution):
    images = torch.rand(3, channels, resolution, resolution) * 2 - 1
    features = MomentSpace(channels, resolution).features(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert torch.equal(features, MomentSpace(channels, resolution).features(images))

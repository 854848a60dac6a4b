from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from genscale.evaluation import image_metrics
from genscale.evaluation.image_metrics import (
    density_coverage,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_recall,
)


def draw(seed: int, images: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, width))


def between(features1: np.ndarray, features2: np.ndarray) -> float:
    return frechet_distance(*gaussian(features1), *gaussian(features2))


def covariance(seed: int, width: int, rank: int | None = None) -> np.ndarray:
    factor = draw(seed, rank or width, width)
    return factor.T @ factor / len(factor)


# The Fréchet distance


def test_frechet_of_a_set_and_itself_is_zero() -> None:
    features = draw(0, 300, 20) @ draw(1, 20, 20)
    assert between(features, features) == pytest.approx(0, abs=1e-10)


def test_frechet_of_a_shift_is_its_squared_length() -> None:
    features, shift = draw(0, 300, 20) @ draw(1, 20, 20), draw(2, 1, 20)
    assert between(features, features + shift) == pytest.approx((shift**2).sum(), rel=1e-10)


def test_frechet_of_a_scale() -> None:
    # Same eigenvectors: the roots of the eigenvalues differ by the factor. tr C (s - 1)^2, and the mean moves.
    features = draw(0, 300, 20) @ draw(1, 20, 20) + 1
    mean, cov = gaussian(features)
    expected = 0.25 * (mean @ mean + np.trace(cov))
    assert between(features, 1.5 * features) == pytest.approx(expected, rel=1e-10)


def test_frechet_does_not_change_under_a_common_rotation() -> None:
    features1, features2 = draw(0, 300, 20) @ draw(1, 20, 20), draw(2, 200, 20) + 0.3
    rotation, _ = np.linalg.qr(draw(3, 20, 20))
    assert between(features1 @ rotation, features2 @ rotation) == pytest.approx(
        between(features1, features2), rel=1e-10
    )


def test_frechet_of_one_rotated_set() -> None:
    # A quarter turn swaps the two axes: variances a, b against b, a; 2 (sqrt a - sqrt b)^2.
    a, b = 4.0, 0.25
    value = frechet_distance(np.zeros(2), np.diag([a, b]), np.zeros(2), np.diag([b, a]))
    assert value == pytest.approx(2 * (a**0.5 - b**0.5) ** 2)


def test_frechet_is_symmetric() -> None:
    one, other = gaussian(draw(0, 300, 20) @ draw(1, 20, 20)), gaussian(draw(2, 25, 20))
    assert frechet_distance(*one, *other) == pytest.approx(frechet_distance(*other, *one), rel=1e-10)


@pytest.mark.parametrize("width", [1, 2, 30])
def test_frechet_is_the_closed_form_of_gaussians(width: int) -> None:
    mean1, mean2 = draw(0, 2, width)
    cov1, cov2 = covariance(1, width, 2 * width), covariance(2, width, 3 * width)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_large_samples_comes_to_that_of_their_populations() -> None:
    mean1, mean2 = draw(0, 2, 4)
    cov1, cov2 = covariance(1, 4, 8), covariance(2, 4, 8)
    random = np.random.default_rng(3)
    sampled = between(
        random.multivariate_normal(mean1, cov1, size=200_000), random.multivariate_normal(mean2, cov2, size=200_000)
    )
    assert sampled == pytest.approx(frechet_distance(mean1, cov1, mean2, cov2), rel=0.02)


@pytest.mark.parametrize("images", [2, 10, 31])
def test_frechet_of_fewer_images_than_features(images: int) -> None:
    """Rank deficiency: the reference goes through the images alone, where nothing is singular.

    With centred images A and B (rows, over sqrt(n - 1)), tr (A'A B'B)^(1/2) is the sum of the singular values of AB'.
    """
    features1, features2 = draw(0, images, 64) * 3, draw(1, 40, 64) + 1
    centred1, centred2 = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (features1, features2))
    shared = np.linalg.svd(centred1 @ centred2.T, compute_uv=False).sum()
    shift = ((features1.mean(0) - features2.mean(0)) ** 2).sum()
    expected = shift + (centred1**2).sum() + (centred2**2).sum() - 2 * shared
    assert between(features1, features2) == pytest.approx(expected, rel=1e-9)
    assert between(features1, features1) == pytest.approx(0, abs=1e-9)


def test_frechet_of_covariances_in_orthogonal_directions_shares_nothing() -> None:
    value = frechet_distance(np.zeros(4), np.diag([2.0, 3, 0, 0]), np.zeros(4), np.diag([0, 0, 5.0, 7]))
    assert value == pytest.approx(17)


def test_frechet_of_constant_features_is_finite() -> None:
    assert between(np.ones((10, 3)), np.zeros((10, 3))) == pytest.approx(3)


def test_frechet_holds_over_sixteen_orders_of_magnitude() -> None:
    scales = 10.0 ** np.arange(-8, 8)  # standard deviations
    value = frechet_distance(np.zeros(16), np.diag(scales**2), np.zeros(16), np.diag((2 * scales) ** 2))
    assert value == pytest.approx((scales**2).sum(), rel=1e-9)


def test_covariance_is_that_of_numpy_in_float64_whatever_comes_in() -> None:
    features = (draw(0, 50, 5) + 1000).astype(np.float32)
    mean, cov = gaussian(features)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-14)
    with pytest.raises(ValueError, match="at least 2"):
        gaussian(features[:1])


# The kernel distance


def brute_force(features1: np.ndarray, features2: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(features1), len(features2)
    within1 = sum(kernel(features1[i], features1[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within2 = sum(kernel(features2[i], features2[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(x, y) for x in features1 for y in features2) / (n * m)
    return within1 + within2 - 2 * across


@pytest.mark.parametrize(("n", "m"), [(2, 2), (25, 25), (13, 30)])
def test_kernel_distance_is_the_double_loop(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_metrics, "BLOCK_BYTES", 300)
    features1, features2 = draw(0, n, 7), draw(1, m, 7) + 0.5
    assert kernel_distance(features1, features2).value == pytest.approx(brute_force(features1, features2), rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    """For equal distributions its mean over many draws is 0, at an N where the Fréchet distance is mostly bias."""
    values = np.array([kernel_distance(draw(2 * i, 30, 5), draw(2 * i + 1, 20, 5)).value for i in range(600)])
    error = values.std(ddof=1) / len(values) ** 0.5
    assert abs(values.mean()) < 4 * error
    assert (values < 0).any(), "an estimate that is never below 0 cannot be 0 in the mean"
    assert between(draw(0, 30, 5), draw(1, 20, 5)) > 0.1


def test_kernel_distance_of_known_distributions() -> None:
    """In one dimension the kernel is 1 + 3xy + 3x²y² + x³y³, so that the squared distance is 3 (difference of means)²
    + 3 (of second moments)² + (of third moments)²."""
    features1, features2 = draw(0, 4000, 1), 0.5 + 1.5 * draw(1, 4000, 1)
    moments2 = 0.5, 0.5**2 + 1.5**2, 0.5**3 + 3 * 0.5 * 1.5**2
    expected = 3 * moments2[0] ** 2 + 3 * (moments2[1] - 1) ** 2 + moments2[2] ** 2
    found = kernel_distance(features1, features2)
    assert abs(found.value - expected) < 4 * found.standard_error


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_standard_error_is_not_too_small(shift: float) -> None:
    found = [kernel_distance(draw(2 * i, 200, 4), draw(2 * i + 1, 200, 4) + shift) for i in range(150)]
    spread = np.std([each.value for each in found], ddof=1)
    stated = np.sqrt(np.mean([each.standard_error**2 for each in found]))
    assert spread < 1.15 * stated
    assert stated < 6 * spread


def test_standard_error_does_not_depend_on_the_order_of_classes() -> None:
    """Generated images come class after class, in turn: parts cut by place would hold one class each."""
    classes = np.arange(400) % 10
    means = 5 * draw(0, 10, 6)
    features1, features2 = means[classes] + draw(1, 400, 6), means[classes] + draw(2, 400, 6)
    ordered = kernel_distance(features1[np.argsort(classes)], features2[np.argsort(classes)])
    mixed = kernel_distance(features1, features2)
    assert ordered.value == pytest.approx(mixed.value, rel=1e-6, abs=1e-9)
    assert 0.3 < ordered.standard_error / mixed.standard_error < 3


def test_kernel_distance_without_enough_images_for_an_error() -> None:
    assert np.isnan(kernel_distance(draw(0, 3, 2), draw(1, 3, 2)).standard_error)
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(draw(0, 1, 2), draw(1, 9, 2))


# Precision and recall, density and coverage


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(((x - y) ** 2).sum()))


def kth(points: np.ndarray, i: int, k: int) -> float:
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


@pytest.mark.parametrize("neighbour", [1, 3, 5])
def test_precision_and_recall_are_those_of_naive_loops(neighbour: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genscale.evaluation.neighbours.BLOCK_BYTES", 500)
    real, generated = draw(0, 40, 3), draw(1, 30, 3) + 1.5
    real_radii = [kth(real, i, neighbour) for i in range(40)]
    generated_radii = [kth(generated, i, neighbour) for i in range(30)]
    precision = np.mean([any(distance(g, real[i]) <= real_radii[i] for i in range(40)) for g in generated])
    recall = np.mean([any(distance(r, generated[i]) <= generated_radii[i] for i in range(30)) for r in real])
    found = precision_recall(real, generated, neighbour)
    assert found == pytest.approx((precision, recall))
    assert 0 < found.recall < 1
    assert 0 < found.precision < 1


@pytest.mark.parametrize("neighbour", [1, 3, 5])
def test_density_and_coverage_are_those_of_naive_loops(neighbour: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genscale.evaluation.neighbours.BLOCK_BYTES", 500)
    real, generated = draw(0, 40, 3), 0.8 * draw(1, 30, 3) + 0.4
    radii = [kth(real, i, neighbour) for i in range(40)]
    held = [[distance(g, real[i]) <= radii[i] for i in range(40)] for g in generated]
    density = sum(map(sum, held)) / (neighbour * 30)
    coverage = np.mean([any(row[i] for row in held) for i in range(40)])
    assert density_coverage(real, generated, neighbour) == pytest.approx((density, coverage))


def test_equal_distributions_have_density_one_and_the_coverage_of_theory() -> None:
    real, generated = draw(0, 2000, 4), draw(1, 2000, 4)
    found = density_coverage(real, generated)
    assert found.density == pytest.approx(1, abs=0.05)
    assert found.coverage == pytest.approx(1 - 0.5**5, abs=0.02)  # Naeem et al. 2020, section 3.3
    precision, recall = precision_recall(real, generated)
    assert precision == pytest.approx(recall, abs=0.05)


def test_one_mode_of_two_has_precision_but_half_of_the_recall() -> None:
    real = np.concatenate([draw(0, 200, 4), draw(1, 200, 4) + 20])
    generated = draw(2, 400, 4)
    precision, recall = precision_recall(real, generated)
    assert precision > 0.8
    assert recall < 0.55
    assert density_coverage(real, generated).coverage == pytest.approx(0.5, abs=0.02)


def test_an_outlier_widens_recall_but_not_coverage() -> None:
    """Why both are given: Naeem et al. 2020, section 3.1."""
    real = draw(0, 300, 4) + 30
    generated = np.concatenate([draw(1, 300, 4), 60 + draw(2, 2, 4)])  # none of it near, two far beyond
    assert precision_recall(real, generated).recall > 0.9
    assert density_coverage(real, generated) == (0, 0)


def test_neighbours_need_more_images_than_their_number() -> None:
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(draw(0, 3, 2), draw(1, 9, 2))
    with pytest.raises(ValueError, match="more than 5 images"):
        density_coverage(draw(0, 9, 2), draw(1, 5, 2))


# Other libraries, on the same features


FEATURES1, FEATURES2 = draw(0, 300, 16), 0.8 * draw(1, 200, 16) + 0.5


def test_agrees_with_torch_fidelity_and_prdc() -> None:
    """torch-fidelity 0.4.0 and prdc 0.2 gave these numbers for these features; the first needs torchvision, which has
    no build that fits the CPU's torch."""
    assert between(FEATURES1, FEATURES2) == pytest.approx(5.151349518261046, rel=1e-12)
    assert kernel_distance(FEATURES1[:200], FEATURES2).value == pytest.approx(1.0462545441794031, rel=1e-12)
    assert precision_recall(FEATURES1, FEATURES2) == pytest.approx((0.86, 0.223333333), rel=1e-6)
    assert precision_recall(FEATURES1, FEATURES2, 5) == pytest.approx((0.92, 0.32))
    assert density_coverage(FEATURES1, FEATURES2) == pytest.approx((1.342, 0.7266666666666667))


def test_agrees_with_torch_fidelity_where_covariances_are_of_deficient_rank() -> None:
    # Its root of the product C1 C2 keeps eight digits there.
    assert between(draw(2, 10, 64), draw(3, 12, 64) + 1) == pytest.approx(175.05389571655044, rel=1e-7)


def test_kernel_distance_is_what_the_mean_over_random_subsets_estimates() -> None:
    found = kernel_distance(FEATURES1[:200], FEATURES2)
    assert found.value == pytest.approx(1.0471, abs=found.standard_error)  # torch-fidelity, 1,000 subsets of 50


def test_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Given(nn.Module):
        """The features are the images."""

        num_features = 16

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    frechet = fid.FrechetInceptionDistance(feature=Given(), normalize=True).set_dtype(torch.float64)
    kernel = kid.KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200, normalize=True)
    for metric in (frechet, kernel):
        metric.update(torch.from_numpy(FEATURES1[:200]).view(200, 16, 1, 1), real=True)
        metric.update(torch.from_numpy(FEATURES2).view(200, 16, 1, 1), real=False)
    assert between(FEATURES1[:200], FEATURES2) == pytest.approx(frechet.compute().item(), rel=1e-9)
    assert kernel_distance(FEATURES1[:200], FEATURES2).value == pytest.approx(kernel.compute()[0].item(), rel=1e-6)

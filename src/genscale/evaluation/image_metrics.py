"""How far apart two sets of images are, in a space of features.

Every function takes features as float arrays (images, d), computes in float64, and holds a bounded part of any matrix
of distances. What the features are is the business of :mod:`genscale.evaluation.features`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genscale.evaluation.neighbours import BLOCK_BYTES, squared_distances, squared_radii

Features = NDArray[np.floating]


class Gaussian(NamedTuple):
    """What the Fréchet distance keeps of a set of features."""

    mean: NDArray[np.float64]
    """(d,)"""
    covariance: NDArray[np.float64]
    """(d, d), divided by images - 1."""


def gaussian(features: Features) -> Gaussian:
    """Mean and covariance of at least 2 images."""
    points = np.asarray(features, dtype=np.float64)
    if len(points) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(points)}")
    mean = points.mean(0)
    centred = points - mean
    return Gaussian(mean, centred.T @ centred / (len(points) - 1))


def frechet_distance(
    mean1: NDArray[np.floating],
    covariance1: NDArray[np.floating],
    mean2: NDArray[np.floating],
    covariance2: NDArray[np.floating],
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Wasserstein distance of two Gaussians (Dowson and Landau
    1982, equation 4; Heusel et al. 2017, equation 6: the "FID" in the features of Inception).

    The trace of the root is taken as the sum of the singular values of R1'R2, where C = RR' from the eigenvalues of
    each symmetric matrix: they are the square roots of the eigenvalues of R1'C2R1. Unlike the root of the product
    C1 C2, which is not symmetric, this needs no complex numbers and holds where covariances are of deficient rank, as
    they are from fewer images than features; and rounding at zero is not raised to its square root.
    """
    difference = np.asarray(mean1, dtype=np.float64) - mean2
    root1, root2 = _root(covariance1), _root(covariance2)
    shared = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + (root1**2).sum() + (root2**2).sum() - 2 * shared))


def _root(covariance: NDArray[np.floating]) -> NDArray[np.float64]:
    """(d, rank) R with RR' = C."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


class KernelDistance(NamedTuple):
    value: float
    """Unbiased: 0 in the mean for equal distributions, and so at times below 0."""
    standard_error: float
    """From the values of disjoint subsets; rather too large than too small."""


def kernel_distance(features1: Features, features2: Features, subsets: int = 10, seed: int = 0) -> KernelDistance:
    """The squared maximum mean discrepancy under the kernel (x'y / d + 1)^3 (Bińkowski et al. 2018, "KID").

    The estimate is the unbiased one of Gretton et al. 2012, equation 3, over all pairs of images: it varies less than
    the usual mean over small random subsets, which it equals in expectation. For its standard error the images are cut
    into ``subsets`` disjoint parts at random, which give independent estimates.
    """
    points1, points2 = (np.asarray(features, dtype=np.float64) for features in (features1, features2))
    if min(len(points1), len(points2)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of each, not {len(points1)} and {len(points2)}")
    random = np.random.default_rng(seed)
    points1, points2 = (points[random.permutation(len(points))] for points in (points1, points2))
    subsets = min(subsets, len(points1) // 2, len(points2) // 2)
    if subsets < 2:
        return KernelDistance(_discrepancy(points1, points2), float("nan"))
    parts = [
        _discrepancy(part1, part2)
        for part1, part2 in zip(np.array_split(points1, subsets), np.array_split(points2, subsets), strict=True)
    ]
    return KernelDistance(_discrepancy(points1, points2), float(np.std(parts, ddof=1) / np.sqrt(subsets)))


def _discrepancy(points1: NDArray[np.float64], points2: NDArray[np.float64]) -> float:
    n, m = len(points1), len(points2)
    within1 = (_kernel_sum(points1, points1) - _kernel(np.einsum("nd,nd->n", points1, points1), points1).sum()) / (
        n * (n - 1)
    )
    within2 = (_kernel_sum(points2, points2) - _kernel(np.einsum("nd,nd->n", points2, points2), points2).sum()) / (
        m * (m - 1)
    )
    return float(within1 + within2 - 2 * _kernel_sum(points1, points2) / (n * m))


def _kernel(products: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    products /= points.shape[1]
    products += 1
    return products * products * products


def _kernel_sum(points1: NDArray[np.float64], points2: NDArray[np.float64]) -> float:
    rows = max(1, BLOCK_BYTES // (8 * len(points2)))
    return sum(
        float(_kernel(points1[start : start + rows] @ points2.T, points1).sum())
        for start in range(0, len(points1), rows)
    )


class PrecisionRecall(NamedTuple):
    precision: float
    """Generated images that lie among the real ones: how good they look."""
    recall: float
    """Real images that lie among the generated ones: how much of the variety is there."""


def precision_recall(real: Features, generated: Features, neighbour: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 to 3).

    A set's manifold is the union of balls around its images, each reaching to the ``neighbour``-th nearest other one.
    """
    _check(real, generated, neighbour)
    return PrecisionRecall(
        _among(generated, real, squared_radii(real, neighbour)),
        _among(real, generated, squared_radii(generated, neighbour)),
    )


def _among(points: Features, centres: Features, radii: NDArray[np.float64]) -> float:
    """The share of points that lie in at least one ball."""
    return sum(int((squares <= radii).any(1).sum()) for _, squares in squared_distances(points, centres)) / len(points)


class DensityCoverage(NamedTuple):
    density: float
    """Balls of real images that hold a generated one, over the number expected; about 1 for equal distributions, more
    where generated images crowd where real ones are dense."""
    coverage: float
    """Real images with a generated one near them; at most about 1 - 2^-neighbour for equal distributions of equal N."""


def density_coverage(real: Features, generated: Features, neighbour: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4).

    Unlike precision and recall they lean on balls of real images alone, so that a generated outlier cannot widen them.
    """
    _check(real, generated, neighbour)
    radii = squared_radii(real, neighbour)
    held, covered = 0, np.zeros(len(real), dtype=bool)
    for _, squares in squared_distances(generated, real):
        inside = squares <= radii  # (rows, real)
        held += int(inside.sum())
        covered |= inside.any(0)
    return DensityCoverage(held / (neighbour * len(generated)), float(covered.mean()))


def _check(real: Features, generated: Features, neighbour: int) -> None:
    fewest = min(len(real), len(generated))
    if fewest <= neighbour:
        raise ValueError(f"the {neighbour}th neighbour needs more than {neighbour} images of each kind, not {fewest}")

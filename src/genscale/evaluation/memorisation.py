"""Whether a generator gives back its training images, which distances between distributions reward.

Three questions are asked of the nearest neighbours of generated images, each with what an honest generator would give:

- Is the nearest real image more often a training image than chance says? Training and held-out images are a random
  split of the same data, so a generator that has learned the distribution, however well or badly, is nearest to a
  training image as often as training images are among the real ones.
- Are there replicas: images much closer to one training image than to the next (Yoon et al. 2023)?
- Are generated images nearer to training images than held-out ones are: C_T (Meehan et al. 2020)? A generator that
  makes typical images only (guidance, truncation) is nearer too, so that this alone does not convict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from genscale.evaluation.neighbours import nearest, squared_distances

REPLICA_RATIO = 1 / 3
"""A replica's nearest training image is at most at this part of the distance of the second (Yoon et al. 2023)."""
SIGNIFICANT = 3.0
"""Standard deviations above chance."""
FEWEST_IN_CELL = 20
"""Generated images, and held-out ones, in a cell of C_T that counts."""


class ClosestPair(NamedTuple):
    generated: int
    """Number of the generated image."""
    training: int
    """Number of the training image that is nearest to it, in the order in which they were given."""
    distance: float


class Memorisation(NamedTuple):
    """What was found. Rates are parts of 1; z are standard deviations above chance."""

    nearest_is_training: float
    """Generated images whose nearest real image is a training image rather than a held-out one."""
    nearest_is_training_expected: float
    """The part of training images among the real ones."""
    nearest_is_training_z: float
    """Over random splits of the real images."""
    replicas: float
    """Generated images that are replicas of one training image."""
    replicas_held_out: float
    """The same of held-out images: near-duplicates in the data itself."""
    replicas_z: float
    closer_than_held_out: float
    """How often a generated image is closer to its nearest training image than a held-out image is to its own; 0.5 is
    expected."""
    copying_statistic: float
    """C_T of Meehan et al. 2020: far below 0 for copies, far above 0 for images unlike the training images; nan where
    no cell has 20 generated and 20 held-out images."""
    closest: tuple[ClosestPair, ...]
    """The generated images nearest to a training image, nearest first."""

    @property
    def suspicious(self) -> bool:
        """Whether generated images lean on training images more than chance allows."""
        return self.nearest_is_training_z > SIGNIFICANT or self.replicas_z > SIGNIFICANT


def memorisation(
    generated: NDArray[np.floating],
    held_out: NDArray[np.floating],
    training: Iterable[NDArray[np.floating]],
    some_training: NDArray[np.floating],
    pairs: int = 8,
    cells: int = 10,
) -> Memorisation:
    """Compare generated images with the training images and with images that were held out.

    Args:
        generated: (m, d) features.
        held_out: (h, d).
        training: parts of (t, d), at least 2 in all; gone through once and never held together.
        some_training: (s, d), what the cells of C_T are made from, by k-means.
        pairs: how many closest pairs to name.
        cells: of C_T, or fewer where they would be too small.
    """
    sizes: list[int] = []
    distances, numbers = nearest(np.concatenate([generated, held_out]), _measured(training, sizes), 2)
    if sum(sizes) < 2:
        raise ValueError(f"replicas are told apart by the second neighbour: 2 training images, not {sum(sizes)}")
    own, others = distances[: len(generated)], distances[len(generated) :]
    to_held_out, held_out_numbers = nearest(generated, [held_out])
    first = own[:, 0] < to_held_out[:, 0]
    rate, expected, z = _leaning(
        numbers[: len(generated), 0][first], held_out_numbers[~first, 0], sum(sizes), len(held_out)
    )
    replicas, held_out_replicas = (pair[:, 0] <= REPLICA_RATIO * pair[:, 1] for pair in (own, others))
    order = np.argsort(own[:, 0], kind="stable")[:pairs]
    return Memorisation(
        nearest_is_training=rate,
        nearest_is_training_expected=expected,
        nearest_is_training_z=z,
        replicas=float(replicas.mean()),
        replicas_held_out=float(held_out_replicas.mean()),
        replicas_z=_difference_of_rates(replicas, held_out_replicas),
        closer_than_held_out=rank_test(others[:, 0], own[:, 0]).above,
        copying_statistic=_copying_statistic(generated, held_out, own[:, 0], others[:, 0], some_training, cells),
        closest=tuple(ClosestPair(int(i), int(numbers[i, 0]), float(own[i, 0])) for i in order),
    )


def _measured(parts: Iterable[NDArray[np.floating]], sizes: list[int]) -> Iterator[NDArray[np.floating]]:
    for part in parts:
        sizes.append(len(part))
        yield part


def _leaning(
    nearest_training: NDArray[np.int64], nearest_held_out: NDArray[np.int64], training: int, held_out: int
) -> tuple[float, float, float]:
    """The rate of generated images whose nearest real one is a training image; what is expected; its z.

    Which real image is nearest does not change when the real images are split anew. So the rate is a sum, over the real
    images drawn as training images, of the share of generated images next to each: drawing without replacement.
    """
    generated, real = len(nearest_training) + len(nearest_held_out), training + held_out
    # The share of generated images that is next to each real image, where it is not 0.
    shares = np.concatenate(
        [np.unique(found, return_counts=True)[1] / generated for found in (nearest_training, nearest_held_out)]
    )
    variance = training * held_out / (real * (real - 1)) * ((shares**2).sum() - 1 / real)
    rate, expected = len(nearest_training) / generated, training / real
    return rate, expected, (rate - expected) / math.sqrt(variance) if variance > 0 else 0.0


def _difference_of_rates(hits1: NDArray[np.bool_], hits2: NDArray[np.bool_]) -> float:
    """z of the first rate above the second, with their common variance."""
    together = (hits1.sum() + hits2.sum()) / (len(hits1) + len(hits2))
    variance = together * (1 - together) * (1 / len(hits1) + 1 / len(hits2))
    return float((hits1.mean() - hits2.mean()) / math.sqrt(variance)) if variance > 0 else 0.0


class RankTest(NamedTuple):
    above: float
    """How often a value of the first sample is above one of the second; ties count half."""
    z: float
    """Standard deviations above 0.5 (Mann and Whitney 1947), with the correction for ties."""


def rank_test(values: NDArray[np.float64], others: NDArray[np.float64]) -> RankTest:
    """The Mann-Whitney U test of two samples."""
    m, n = len(values), len(others)
    ascending = np.sort(others)
    below = np.searchsorted(ascending, values, side="left") + np.searchsorted(ascending, values, side="right")
    u = float(below.sum()) / 2
    _, ties = np.unique(np.concatenate([values, others]), return_counts=True)
    tied = float((ties.astype(np.float64) ** 3 - ties).sum()) / ((m + n) * (m + n - 1)) if m + n > 1 else 0.0
    variance = m * n / 12 * (m + n + 1 - tied)
    return RankTest(u / (m * n), (u - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0)


def _copying_statistic(
    generated: NDArray[np.floating],
    held_out: NDArray[np.floating],
    generated_distances: NDArray[np.float64],
    held_out_distances: NDArray[np.float64],
    some_training: NDArray[np.floating],
    cells: int,
) -> float:
    """C_T (Meehan et al. 2020, section 4.3): the rank test within cells of the space, weighed by held-out images."""
    cells = max(1, min(cells, min(len(generated), len(held_out)) // (2 * FEWEST_IN_CELL), len(some_training)))
    centres = _centres(np.asarray(some_training, dtype=np.float64), cells)
    cell, held_out_cell = (nearest(points, [centres])[1][:, 0] for points in (generated, held_out))
    total = weights = 0.0
    for number in range(cells):
        mine, theirs = generated_distances[cell == number], held_out_distances[held_out_cell == number]
        if min(len(mine), len(theirs)) >= FEWEST_IN_CELL:
            total += len(theirs) * rank_test(mine, theirs).z
            weights += len(theirs)
    return total / weights if weights else math.nan


def _centres(points: NDArray[np.float64], count: int, rounds: int = 25) -> NDArray[np.float64]:
    """k-means (Lloyd 1982), begun as k-means++ (Arthur and Vassilvitskii 2007); the same for the same points."""
    random = np.random.default_rng(0)
    centres = points[:1]
    while len(centres) < count:
        gaps = nearest(points, [centres])[0][:, 0] ** 2
        if not gaps.any():  # fewer different points than cells
            break
        centres = np.concatenate([centres, points[[random.choice(len(points), p=gaps / gaps.sum())]]])
    for _ in range(rounds):
        own = np.concatenate([squares.argmin(1) for _, squares in squared_distances(points, centres)])
        sizes = np.bincount(own, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, own, points)
        moved = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres

"""How many modes of the data a generator reaches, and how evenly: Stacked-MNIST and any labelled data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Modes(NamedTuple):
    covered: int
    """Modes with at least one generated image."""
    total: int
    divergence: float
    """Kullback-Leibler divergence of the generated images' modes from the real ones', in nats; 0 is best."""


def modes(predictions: NDArray[np.integer], total: int, real: NDArray[np.integer] | None = None) -> Modes:
    """Count the modes of generated images.

    As published figures do (Metz et al. 2017, section 3.3.1; Lin et al. 2018), the divergence is KL(generated || real).
    At N images and K modes it is about (K - 1) / 2N even where the generator is perfect.

    Args:
        predictions: (images,) the class of each generated image, from 0.
        total: how many classes there are.
        real: (total,) how many real images each class has; by default all the same.
    """
    generated = np.bincount(predictions, minlength=total)
    expected = np.ones(total) if real is None else np.asarray(real, dtype=np.float64)
    reached = generated > 0
    share = generated[reached] / generated.sum()
    with np.errstate(divide="ignore"):  # a class that has no real images is infinitely far
        divergence = float((share * np.log(share / (expected[reached] / expected.sum()))).sum())
    return Modes(int(reached.sum()), total, divergence)


def stacked_classes(digits: NDArray[np.integer]) -> NDArray[np.int64]:
    """The class of each stacked image, 0 to 10^channels - 1, from the digit that is seen in each of its channels.

    Args:
        digits: (images, channels) from 0 to 9; the first channel is the most significant.
    """
    return digits.astype(np.int64) @ 10 ** np.arange(digits.shape[1])[::-1]

"""Every distance between generated and real images, beside what two sets of real images give."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genscale.evaluation.image_metrics import (
    density_coverage,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_recall,
)

FEWEST = 20
"""Images of each kind: the kernel distance's standard error comes from 10 subsets of at least 2."""


def compare(reference: NDArray[np.floating], images: NDArray[np.floating]) -> dict[str, float]:
    """Every metric of images, generated or real, against reference images; both (N, d) features of at least 20."""
    kernel = kernel_distance(reference, images)
    precision = precision_recall(reference, images)
    density = density_coverage(reference, images)
    return {
        "frechet_distance": frechet_distance(*gaussian(reference), *gaussian(images)),
        "kernel_distance": kernel.value,
        "kernel_distance_standard_error": kernel.standard_error,
        "precision": precision.precision,
        "recall": precision.recall,
        "density": density.density,
        "coverage": density.coverage,
    }


def compare_with_floor(
    extractor: str,
    reference: NDArray[np.floating],
    generated: NDArray[np.floating],
    real: NDArray[np.floating],
) -> dict[str, float]:
    """Every metric under a name that says how it was computed, and its floor.

    At small N the Fréchet distance is mostly bias, so that it means something only beside the distance of as many
    real images, which no generator can be expected to undercut.

    Args:
        extractor: its name.
        reference: (N, d) features of real images.
        generated: (N, d).
        real: (N, d) of real images that are not in the reference.

    Returns:
        ``"frechet_distance(classifier, N=5000)"`` and so on for the generated images, and
        ``"frechet_distance(classifier, N=5000, real)"`` for the real ones.
    """
    number = len(generated)
    if not len(reference) == len(real) == number:
        raise ValueError(f"the floor is of equal N: {len(reference)} reference, {number} generated, {len(real)} real")
    named = {f"{name}({extractor}, N={number})": value for name, value in compare(reference, generated).items()}
    floor = {f"{name}({extractor}, N={number}, real)": value for name, value in compare(reference, real).items()}
    return named | floor

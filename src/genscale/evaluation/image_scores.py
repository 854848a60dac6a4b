"""Every score of drawn images: distances beside their floor, what their classes look like, whether they are copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.permutation import evenly_spread
from genscale.evaluation.classifier import RealImages
from genscale.evaluation.features import Extractor, extract, extract_real, pixel_extractor, real_features
from genscale.evaluation.image_comparison import FEWEST, compare_with_floor
from genscale.evaluation.memorisation import Memorisation, memorisation
from genscale.evaluation.modes import modes
from genscale.runtime.errors import UserError

DEFAULT_COUNT = 5000
MOST_HELD_OUT = 5000
"""Held-out images whose neighbours are looked for."""
MOST_TRAINING = 200_000
"""Training images among which they are looked for."""

Progress = Callable[[str, float, float | None, str], None]
"""Stage, done, total, unit."""


def silent(stage: str, done: float, total: float | None, unit: str) -> None:
    return


class Sets(NamedTuple):
    """Which real images stand for what; numbers are within their split."""

    reference: NDArray[np.int64]
    """(count,) training images that everything is compared with."""
    floor: str
    """The split of the images that stand in for generated ones."""
    real: NDArray[np.int64]
    """(count,) these images."""


def choose_sets(training: RealImages, validation: RealImages, count: int | None) -> Sets:
    """As many reference images as generated ones, and as many others: held-out images, or else training images.

    Raises:
        UserError: there are fewer images than the metrics need.
    """
    most = max(min(len(training), len(validation)), len(training) // 2)
    there = f"the store has {len(training):,} training and {len(validation):,} validation images"
    if most < FEWEST or not len(validation):
        raise UserError(
            f"evaluation needs {FEWEST} real images, {FEWEST} others to compare them with, and held-out ones; {there}"
        )
    count = min(DEFAULT_COUNT, most) if count is None else count
    if count < FEWEST:
        raise UserError(f"count: the metrics need at least {FEWEST} generated images, not {count}")
    if count > most:
        raise UserError(
            f"count: {count:,} generated images need as many real ones and as many others, but {there}; "
            f"ask for at most {most:,}"
        )
    order = np.random.default_rng(0).permutation(len(training))
    reference = np.sort(order[:count])
    if len(validation) >= count:
        real = np.sort(np.random.default_rng(1).permutation(len(validation))[:count])
        return Sets(reference, "validation", real)
    return Sets(reference, "training", np.sort(order[count : 2 * count]))


def score_images(
    generated: Tensor,
    intended: NDArray[np.int64] | None,
    training: RealImages,
    validation: RealImages,
    sets: Sets,
    extractor: Extractor,
    classifier: Extractor | None,
    classes: int,
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """Every score of generated images, under names that say how it was computed.

    Args:
        generated: (count, channels, height, width) from -1 to 1.
        intended: (count,) the class that each was drawn for; None where they were drawn for none.
        sets: of the same ``count``.
        extractor: of the space of features.
        classifier: of the data's classes; None where it has none.

    Returns:
        a dictionary that JSON can write, with None for a number that does not exist:

        - the metrics of :func:`genscale.evaluation.image_comparison.compare_with_floor`; ``floor``, the split of the
          real images that it is of; ``count``; ``extractor``;
        - for labelled data, each of generated images and of real ones: ``modes``, how many of the ``classes`` are seen,
          and ``modes_divergence``; ``label_accuracy``, where images were drawn for classes;
        - what :class:`genscale.evaluation.memorisation.Memorisation` holds, in the extractor's space and in that of
          pixels, where copies are seen that mean something else to the extractor; ``memorisation_suspicious``, whether
          either is; ``memorisation_searched``, among how many training images;
        - ``closest_pairs``: numbers of a generated image and of its nearest training image, and their ``distance``.
    """
    on_progress("features", 0, None, "images")
    real_split = validation if sets.floor == "validation" else training
    found = extract(extractor, generated)
    reference = extract_real(extractor, training, sets.reference)
    real = extract_real(extractor, real_split, sets.real)
    on_progress("distances", 0, None, "images")
    scores: dict[str, Any] = compare_with_floor(extractor.name, reference.features, found.features, real.features)
    scores |= {"floor": sets.floor, "count": len(generated), "extractor": extractor.name}
    if classifier is not None:
        same = classifier is extractor
        seen = found.classes if same else extract(classifier, generated).classes
        real_seen = real.classes if same else extract_real(classifier, real_split, sets.real).classes
        assert seen is not None
        assert real_seen is not None
        scores |= _class_scores(seen, real_seen, intended, training, real_split, sets, classes)
    looks = {}
    for space in (extractor, pixel_extractor(extractor.device)):
        on_progress(f"neighbours among {space.name}", 0, None, "images")
        own = space is extractor
        looks[space.name] = memorisation(
            found.features if own else extract(space, generated).features,
            extract_real(space, validation, evenly_spread(len(validation), MOST_HELD_OUT)).features,
            real_features(space, training, searched := evenly_spread(len(training), MOST_TRAINING)),
            reference.features if own else extract_real(space, training, sets.reference).features,
        )
        scores |= _memorisation_scores(looks[space.name], f"{space.name}, N={len(generated)}")
    scores["memorisation_suspicious"] = any(look.suspicious for look in looks.values())
    scores["memorisation_searched"] = len(searched)
    pairs = looks[extractor.name].closest
    scores["closest_pairs"] = [pair._asdict() | {"training": int(searched[pair.training])} for pair in pairs]
    return {name: _json_able(value) for name, value in scores.items()}


def _memorisation_scores(found: Memorisation, name: str) -> dict[str, Any]:
    """What was found, and what an honest generator would give in the place of real images."""
    return {
        f"nearest_is_training({name})": found.nearest_is_training,
        f"nearest_is_training({name}, real)": found.nearest_is_training_expected,
        f"nearest_is_training_z({name})": found.nearest_is_training_z,
        f"replicas({name})": found.replicas,
        f"replicas({name}, real)": found.replicas_held_out,
        f"replicas_z({name})": found.replicas_z,
        f"closer_than_held_out({name})": found.closer_than_held_out,
        f"closer_than_held_out({name}, real)": 0.5,
        f"copying_statistic({name})": found.copying_statistic,
        f"copying_statistic({name}, real)": 0.0,
    }


def _class_scores(
    seen: NDArray[np.int64],
    real_seen: NDArray[np.int64],
    intended: NDArray[np.int64] | None,
    training: RealImages,
    real_split: RealImages,
    sets: Sets,
    classes: int,
) -> dict[str, Any]:
    assert training.labels is not None
    counts = np.bincount(training.labels[training.labels >= 0], minlength=classes)
    generated, real = modes(seen, classes, counts), modes(real_seen, classes, counts)
    name = f"classifier, N={len(seen)}"
    scores: dict[str, Any] = {
        "classes": classes,
        f"modes({name})": generated.covered,
        f"modes({name}, real)": real.covered,
        f"modes_divergence({name})": generated.divergence,
        f"modes_divergence({name}, real)": real.divergence,
    }
    if intended is not None and real_split.labels is not None:
        labels = real_split.labels[sets.real]
        scores[f"label_accuracy({name})"] = float((seen == intended).mean())
        known = labels >= 0
        scores[f"label_accuracy({name}, real)"] = float((real_seen == labels)[known].mean()) if known.any() else None
    return scores


def _json_able(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

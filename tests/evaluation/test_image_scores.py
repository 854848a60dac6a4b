from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genscale.evaluation.features import Extractor
from genscale.evaluation.image_comparison import compare_with_floor
from genscale.evaluation.image_metrics import frechet_distance, gaussian, kernel_distance
from genscale.evaluation.image_scores import choose_sets, score_images
from genscale.runtime.errors import UserError

NUMBER = 100


def corners() -> Extractor:
    """Features: the brightness of the four places that the classes light; the class is the brightest."""

    def features(images: Tensor) -> Tensor:
        return torch.stack(
            [images[:, 0, 1 + 3 * r : 3 + 3 * r, 1 + 3 * c : 4 + 3 * c].mean((1, 2)) for r in (0, 1) for c in (0, 1)], 1
        )

    return Extractor("corners", features, lambda found: found, torch.device("cpu"))


def score(pictures: Callable[..., Any], generated: Tensor, intended: np.ndarray | None) -> dict[str, Any]:
    training, validation = pictures(900, 4, 0), pictures(300, 4, 1)
    sets = choose_sets(training, validation, NUMBER)
    return score_images(generated, intended, training, validation, sets, corners(), corners(), 4)


def test_fresh_images_score_as_real_ones_do(pictures: Callable[..., Any]) -> None:
    fresh = pictures(NUMBER, 4, 7)
    scores = score(pictures, fresh.images(np.arange(NUMBER)), fresh.labels)
    assert scores["floor"] == "validation"
    assert scores["count"] == NUMBER
    value, floor = scores["frechet_distance(corners, N=100)"], scores["frechet_distance(corners, N=100, real)"]
    assert 0.2 < value / floor < 5
    assert scores["label_accuracy(classifier, N=100)"] == scores["label_accuracy(classifier, N=100, real)"] == 1
    assert scores["modes(classifier, N=100)"] == scores["modes(classifier, N=100, real)"] == scores["classes"] == 4
    assert scores["modes_divergence(classifier, N=100)"] < 0.1
    assert scores["memorisation_searched"] == 900
    assert scores["memorisation_suspicious"] is False


def test_copies_have_a_small_distance_and_are_found_out(pictures: Callable[..., Any]) -> None:
    training = pictures(900, 4, 0)
    scores = score(pictures, training.images(np.arange(NUMBER)), training.labels[:NUMBER])
    floor = scores["frechet_distance(corners, N=100, real)"]
    assert scores["frechet_distance(corners, N=100)"] < 5 * floor, "the distance rewards copies"
    assert scores["memorisation_suspicious"] is True
    for space in ("corners", "pixels"):
        assert scores[f"replicas({space}, N=100)"] == 1
        assert scores[f"nearest_is_training({space}, N=100)"] == 1
        assert scores[f"nearest_is_training({space}, N=100, real)"] == 0.75
    assert len(scores["closest_pairs"]) == 8
    for pair in scores["closest_pairs"]:
        assert pair == {"generated": pair["generated"], "training": pair["generated"], "distance": 0}


def test_copies_that_the_features_do_not_see_are_found_among_pixels(pictures: Callable[..., Any]) -> None:
    """Copies made a little brighter lose themselves among the features, which are four brightnesses."""
    scores = score(pictures, 0.03 + pictures(900, 4, 0).images(np.arange(NUMBER)), None)
    assert scores["replicas(corners, N=100)"] < 0.1
    assert scores["nearest_is_training_z(corners, N=100)"] < 3
    assert scores["replicas(pixels, N=100)"] > 0.9
    assert scores["memorisation_suspicious"] is True


def test_one_class_drawn_for_all_is_seen_in_every_score(pictures: Callable[..., Any]) -> None:
    scores = score(pictures, pictures(NUMBER, 1, 7).images(np.arange(NUMBER)), np.arange(NUMBER) % 4)
    assert scores["label_accuracy(classifier, N=100)"] == 0.25
    assert scores["modes(classifier, N=100)"] == 1
    assert scores["modes_divergence(classifier, N=100)"] == pytest.approx(np.log(4), abs=0.2)
    assert scores["coverage(corners, N=100)"] < 0.5 < scores["coverage(corners, N=100, real)"]
    assert (
        scores["kernel_distance(corners, N=100)"]
        > 10 * scores["kernel_distance_standard_error(corners, N=100, real)"]
        + scores["kernel_distance(corners, N=100, real)"]
    )


def test_scores_can_be_written_as_json(pictures: Callable[..., Any]) -> None:
    scores = score(pictures, pictures(NUMBER, 4, 7).images(np.arange(NUMBER)), None)
    json.dumps(scores, allow_nan=False)
    assert "label_accuracy(classifier, N=100)" not in scores


def test_data_without_classes_has_no_class_scores(pictures: Callable[..., Any]) -> None:
    training, validation = pictures(90, 4, 0, labelled=False), pictures(30, 4, 1, labelled=False)
    generated = pictures(20, 4, 2).images(np.arange(20))
    scores = score_images(
        generated, None, training, validation, choose_sets(training, validation, 20), corners(), None, 0
    )
    assert not any("modes" in name or "label" in name for name in scores)
    assert "recall(corners, N=20)" in scores


def test_names_say_the_extractor_and_the_number_and_the_floor_stands_beside() -> None:
    random = np.random.default_rng(0)
    reference, generated, real = random.normal(size=(3, 50, 4))
    scores = compare_with_floor("inception", reference, generated, real)
    assert scores["frechet_distance(inception, N=50)"] == frechet_distance(*gaussian(reference), *gaussian(generated))
    assert scores["frechet_distance(inception, N=50, real)"] == frechet_distance(*gaussian(reference), *gaussian(real))
    assert scores["kernel_distance(inception, N=50, real)"] == kernel_distance(reference, real).value
    for name in ("kernel_distance_standard_error", "precision", "recall", "density", "coverage"):
        assert f"{name}(inception, N=50)" in scores
        assert f"{name}(inception, N=50, real)" in scores
    with pytest.raises(ValueError, match="equal N"):
        compare_with_floor("inception", reference, generated[:40], real)


def test_sets_are_disjoint_and_of_the_number_asked_for(pictures: Callable[..., Any]) -> None:
    training, validation = pictures(300, 4, 0), pictures(100, 4, 1)
    sets = choose_sets(training, validation, 100)
    assert sets.floor == "validation"
    assert sets.real.tolist() == list(range(100))
    assert len(set(sets.reference.tolist())) == 100
    sets = choose_sets(training, validation, 150)
    assert sets.floor == "training"
    assert sorted([*sets.reference.tolist(), *sets.real.tolist()]) == list(range(300))
    assert len(choose_sets(training, validation, None).reference) == 150


@pytest.mark.parametrize(
    ("training", "validation", "count", "message"),
    [
        (300, 100, 151, r"count: 151 generated images .* has 300 training and 100 validation images; .* at most 150$"),
        (300, 100, 19, r"count: the metrics need at least 20 generated images, not 19"),
        (30, 10, None, r"needs 20 real images, 20 others .*; the store has 30 training and 10 validation images"),
    ],
)
def test_fewer_images_than_the_metrics_need(
    pictures: Callable[..., Any], training: int, validation: int, count: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_sets(pictures(training, 4, 0), pictures(validation, 4, 1), count)

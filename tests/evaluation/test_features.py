from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from genscale.evaluation.classifier import Classifier
from genscale.evaluation.features import (
    Extractor,
    classifier_extractor,
    extract,
    extract_real,
    pixel_extractor,
    real_features,
)

CPU = torch.device("cpu")


def means() -> Extractor:
    """Features: the mean and the largest value of each image; class 1 where the mean is above -0.6."""
    return Extractor(
        "means",
        lambda images: torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], 1),
        lambda features: torch.stack([torch.full((len(features),), -0.6), features[:, 0]], 1),
        CPU,
    )


def test_features_do_not_depend_on_the_batch(pictures: Callable[..., Any]) -> None:
    real = pictures(50, 4, 0)
    images = real.images(np.arange(50))
    whole, cut = extract(means(), images), extract(means(), images, batch=7)
    assert whole.features.shape == (50, 2)
    np.testing.assert_array_equal(whole.features, cut.features)
    np.testing.assert_array_equal(whole.classes, cut.classes)
    np.testing.assert_array_equal(whole.features[:, 1], images.amax((1, 2, 3)))
    np.testing.assert_array_equal(whole.classes, whole.features[:, 0] > -0.6)


def test_features_of_numbered_images_and_their_parts_are_the_same(pictures: Callable[..., Any]) -> None:
    real, numbers = pictures(50, 4, 0), np.array([40, 3, 3, 17, 0])
    expected = extract(means(), real.images(numbers)).features
    np.testing.assert_array_equal(extract_real(means(), real, numbers, batch=2).features, expected)
    parts = list(real_features(means(), real, numbers, part=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_a_rotation_classifier_knows_no_classes_of_the_data(pictures: Callable[..., Any]) -> None:
    network, images = Classifier(1, 8, 4).eval(), pictures(3, 4, 0).images(np.arange(3))
    assert extract(classifier_extractor(network, "rotation classifier"), images).classes is None
    found = extract(classifier_extractor(network, "classifier"), images)
    assert found.classes is not None
    assert found.classes.tolist() == network(images).argmax(1).tolist()


def test_pixels_are_means_over_squares(pictures: Callable[..., Any]) -> None:
    images = torch.arange(2 * 28 * 28.0).view(2, 1, 28, 28)
    found = extract(pixel_extractor(CPU), images).features.reshape(2, 14, 14)
    np.testing.assert_allclose(found[1, 3, 5], images[1, 0, 6:8, 10:12].mean())
    small = pictures(3, 4, 0).images(np.arange(3))
    np.testing.assert_array_equal(extract(pixel_extractor(CPU), small).features, small.flatten(1))
    assert extract(pixel_extractor(CPU), torch.zeros(1, 3, 50, 50)).features.shape == (1, 3 * 13 * 13)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genscale.evaluation.classifier import Classifier, publish_classifier

CPU = torch.device("cpu")


def publish(folder: Path, training: Any, validation: Any, **options: Any) -> tuple[Classifier, dict[str, Any]]:
    settings = {"classes": 4, "data": "abc", "device": CPU, "images_seen": 20 * 128} | options
    return publish_classifier(folder, training, validation, **settings)


def test_learns_the_classes_and_is_published(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    network, facts = publish(tmp_path / "evaluation", pictures(400, 4, 0), pictures(200, 4, 1))
    assert facts["kind"] == "classifier"
    assert facts["accuracy"] > 0.95
    assert json.loads((tmp_path / "evaluation" / "classifier.json").read_text()) == facts
    validation = pictures(200, 4, 1)
    with torch.no_grad():
        right = network(validation.images(np.arange(200))).argmax(1).numpy() == validation.labels
    assert right.mean() == facts["accuracy"]


def test_is_a_function_of_the_seed_and_the_data(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    first, same, other = (
        publish(tmp_path / str(number), pictures(300, 4, 0), pictures(50, 4, 1), seed=seed)[0].state_dict()
        for number, seed in enumerate((3, 3, 4))
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_is_read_again_rather_than_trained_again(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    training, validation = pictures(300, 4, 0), pictures(50, 4, 1)
    steps: list[int] = []

    def again(**options: Any) -> tuple[Classifier, dict[str, Any]]:
        steps.clear()
        return publish(tmp_path, training, validation, on_progress=lambda done, _: steps.append(done), **options)

    trained, facts = again()
    assert len(steps) == 20
    read, same_facts = again()
    assert not steps
    assert same_facts == facts
    images = training.images(np.arange(10))
    assert torch.equal(read(images), trained(images))
    assert not read.training
    again(data="another fingerprint")
    assert steps
    again(data="another fingerprint", seed=1)
    assert steps
    weights = tmp_path / "classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    again(data="another fingerprint", seed=1)
    assert steps, "a damaged file is not believed"


def test_without_labels_it_tells_rotations_apart(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    training, validation = pictures(400, 1, 0, labelled=False), pictures(200, 1, 1, labelled=False)
    _, facts = publish(tmp_path, training, validation, classes=0)
    assert facts["kind"] == "rotation classifier"
    assert facts["classes"] == 4
    assert facts["accuracy"] > 0.9  # the square is in one corner, so that its place tells the rotation
    assert (tmp_path / "rotation-classifier.safetensors").exists()


def test_images_of_unknown_class_are_left_out(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    training, validation = pictures(400, 4, 0), pictures(100, 4, 1)
    training.labels[::2] = -1
    validation.labels[:90] = -1
    _, facts = publish(tmp_path, training, validation)
    assert facts["accuracy"] > 0.9


def test_small_data_is_not_gone_through_without_end(tmp_path: Path, pictures: Callable[..., Any]) -> None:
    _, facts = publish(tmp_path, pictures(64, 4, 0), pictures(10, 4, 1), images_seen=1_000_000)
    assert facts["images_seen"] == 64 * 30


@pytest.mark.parametrize(("channels", "resolution"), [(1, 4), (1, 28), (3, 32), (3, 100)])
def test_takes_any_resolution(channels: int, resolution: int) -> None:
    network = Classifier(channels, resolution, 5).eval()
    images = torch.zeros(2, channels, resolution, resolution)
    assert network.features(images).shape == (2, 128)
    assert network(images).shape == (2, 5)

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from genscale.data.image_batch import ImageBatch
from genscale.data.image_store import write_image_store
from genscale.evaluation import image_evaluation as module
from genscale.evaluation.classifier import publish_classifier
from genscale.evaluation.image_evaluation import evaluate_images, intended_classes, picture_of_pairs
from genscale.evaluation.memorisation import ClosestPair
from genscale.evaluation.real_images import StoredImages
from genscale.generation.grid import to_pixels
from genscale.objectives.conditioning import Conditioning
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.objective import Loss, Objective
from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

CLASSES = ("north-west", "north-east", "south-west", "south-east")


class Lamp(Objective):
    """Lights the place of the class it is asked for, or gives back stored images."""

    def __init__(self, copies: Tensor | None = None, kind: Literal["none", "class"] = "class"):
        super().__init__()
        self.networks = nn.ModuleDict()
        self.conditioning = Conditioning(kind, 0.1, len(CLASSES), 0)
        self.copies = copies
        self.asked: list[int] = []

    def validate(self, batch: ImageBatch, rng: Rng) -> Loss:
        brightness = batch.images.mean(dim=(1, 2, 3))
        return Loss(brightness.sum(), {"loss": (brightness.sum(), torch.tensor(len(batch)))})

    def sample(self, request: ImageRequest, rng: Rng) -> Tensor:
        assert request.labels is not None
        self.asked += request.labels.tolist()
        if self.copies is not None:
            return self.copies[rng.positions]
        images = 0.1 * rng.normal("noise", (1, 8, 8)) - 0.7
        for image, label, light in zip(images, request.labels.tolist(), rng.uniform("light").tolist(), strict=True):
            row, column = divmod(label, 2)
            image[:, 1 + 3 * row : 3 + 3 * row, 1 + 3 * column : 4 + 3 * column] = 0.5 + 0.4 * light
        return images


@pytest.fixture
def run(tmp_path: Path, pictures: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with a store of 400 training and 120 held-out images; its classifier learns in a moment."""
    splits = {"train": pictures(400, 4, 0), "validation": pictures(120, 4, 1)}
    store = write_image_store(
        tmp_path / "store",
        {split: to_pixels(real.images(np.arange(len(real)))) for split, real in splits.items()},
        {split: real.labels for split, real in splits.items()},
        CLASSES,
        shard_images=150,
    )
    monkeypatch.setattr(
        module, "publish_classifier", lambda *given, **options: publish_classifier(*given, images_seen=1280, **options)
    )
    recipe = recipe_from_mapping(
        {
            "data": {"kind": "images", "store": str(tmp_path / "store"), "resolution": 8, "channels": 1},
            "model": {"kind": "unet", "width": 8, "multipliers": [1], "attention": [], "head_width": 8},
            "objective": {"kind": "flow"},
            "training": {"budget": "64 images", "batch": "8 images"},
        }
    )
    return Run.create(tmp_path / "run", recipe, store.fingerprint)


def draws_with(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_objective", lambda run, checkpoint, device: objective.eval())


def test_an_honest_generator(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, stages = Lamp(), []
    draws_with(objective, monkeypatch)
    scores = evaluate_images(run, "last", device="cpu", count=100, on_progress=lambda *told: stages.append(told[0]))
    assert scores["label_accuracy(classifier, N=100)"] > 0.95
    assert scores["classifier"]["accuracy"] > 0.95
    assert scores["modes(classifier, N=100)"] == 4
    assert scores["floor"] == "validation"
    assert scores["memorisation_suspicious"] is False
    assert len(objective.asked) == 100
    assert list(dict.fromkeys(stages)) == [
        "training the classifier",
        "drawing",
        "features",
        "distances",
        "neighbours among classifier",
        "neighbours among pixels",
        "loss",
    ]
    # Light is drawn anew for each image, so that either split is as bright as the other but for chance.
    assert scores["gap"] == pytest.approx(scores["validation_loss"] - scores["training_loss"])
    assert abs(scores["gap"]) < 0.05
    assert scores["recorded"] is True
    facts = json.loads((run.directory / "facts.json").read_text())
    recorded = facts["image_evaluation"]
    assert recorded.pop("checkpoint") == "last"
    assert recorded == {name: value for name, value in scores.items() if name != "recorded"}
    assert facts["status"] == "created", "other facts are kept"
    assert (run.directory / "evaluation" / "classifier.safetensors").exists()


def test_a_copier_is_found_out_and_its_pairs_are_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    training = StoredImages(run.store, "train")
    draws_with(Lamp(copies=training.images(np.arange(100))), monkeypatch)
    scores = evaluate_images(run, device="cpu", count=100)
    assert scores["memorisation_suspicious"] is True
    assert scores["replicas(classifier, N=100)"] > 0.9
    assert all(pair["generated"] == pair["training"] for pair in scores["closest_pairs"])
    assert scores["closest_pairs"][-1]["distance"] < 1e-4  # convolutions round by the batch
    picture = np.asarray(Image.open(run.directory / "evaluation" / "closest-pairs.png"))
    assert picture.shape == (16, 64)
    np.testing.assert_array_equal(picture[:8], picture[8:])


def test_the_same_seed_gives_the_same_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draws_with(Lamp(), monkeypatch)
    first, same, other = (evaluate_images(run, device="cpu", count=60, seed=seed) for seed in (1, 1, 2))
    assert first == same
    name = "frechet_distance(classifier, N=60)"
    assert first[name] != other[name]
    assert first[f"{name[:-1]}, real)"] == other[f"{name[:-1]}, real)"]


def test_a_run_in_use_is_scored_but_not_written_to(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draws_with(Lamp(), monkeypatch)
    before = (run.directory / "facts.json").read_bytes()
    with run.lock():
        assert evaluate_images(run, device="cpu", count=20)["recorded"] is False
    assert (run.directory / "facts.json").read_bytes() == before


def test_more_images_than_there_are_real_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draws_with(Lamp(), monkeypatch)
    with pytest.raises(UserError, match=r"has 400 training and 120 validation images; ask for at most 200$"):
        evaluate_images(run, device="cpu", count=201)
    with pytest.raises(UserError, match="expected 'classifier', 'imagenet' or a TorchScript file, not 'classifer'"):
        evaluate_images(run, device="cpu", count=20, extractor="classifer")


def test_stored_images_are_read_by_number_across_shards(run: Run, pictures: Callable[..., Any]) -> None:
    stored, expected = StoredImages(run.store, "train"), pictures(400, 4, 0)
    assert len(stored) == 400
    numbers = np.array([399, 0, 149, 150, 299, 300, 150])
    np.testing.assert_allclose(stored.images(numbers), expected.images(numbers), atol=1 / 127)
    assert stored.labels is not None
    np.testing.assert_array_equal(stored.labels, expected.labels)
    assert stored.captions(numbers) is None


def test_images_are_drawn_for_the_classes_of_the_reference() -> None:
    training: Any = SimpleNamespace(labels=np.array([3, -1, 2, 1, -1, 3]))
    intended = intended_classes(Lamp(), training, np.array([0, 1, 3, 4]))
    assert intended is not None
    assert intended[[0, 2]].tolist() == [3, 1]
    assert (intended >= 0).all(), "where the class is not known, another image's is taken"
    assert intended_classes(Lamp(kind="none"), training, np.arange(3)) is None


def test_a_picture_of_pairs_has_the_generated_images_above(pictures: Callable[..., Any]) -> None:
    training = pictures(10, 4, 0)
    generated = torch.full((3, 1, 8, 8), -1.0)
    pairs = [ClosestPair(2, 7, 0.1), ClosestPair(0, 3, 0.2)]
    picture = np.asarray(Image.open(io.BytesIO(picture_of_pairs(pairs, generated, training))))
    assert picture.shape == (16, 16)
    assert not picture[:8].any()
    np.testing.assert_array_equal(picture[8:, :8], to_pixels(training.images(np.array([7])))[0, :, :, 0])

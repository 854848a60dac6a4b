"""Drawing images with a run's weights, and scoring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.data.image_store import ImageStore
from genscale.data.image_stream import ImageStream
from genscale.evaluation.classifier import RealImages, publish_classifier
from genscale.evaluation.features import Extractor, classifier_extractor
from genscale.evaluation.image_scores import Progress, choose_sets, score_images, silent
from genscale.evaluation.memorisation import ClosestPair
from genscale.evaluation.overfitting import denoising_gap
from genscale.evaluation.pretrained import pretrained_extractor
from genscale.evaluation.real_images import StoredImages
from genscale.generation.grid import grid, png_bytes, to_pixels
from genscale.generation.images import draw, told
from genscale.objectives.objective import Objective
from genscale.recipe.sampling import ImageSampling
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically
from genscale.training.restore import load_objective

MOST_COMPARED = 2_000
"""Images of either split whose loss is taken."""


def evaluate_images(
    run: Run | str | Path,
    checkpoint: str | int = "best",
    *,
    device: str = "auto",
    count: int | None = None,
    extractor: str = "classifier",
    sampling: ImageSampling | None = None,
    seed: int = 0,
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """Draw images with a run's weights and compare them with its real images.

    Every distance is between ``count`` generated images and ``count`` training images; each image is drawn for the
    class, or the caption, of one of these. Beside it stands its floor: as many other real images in place of the
    generated ones. The scores are also recorded in the run's facts, unless the run is in use or cannot be written.

    Args:
        run: the run or its directory. Its data store is needed.
        checkpoint: ``best``, ``last``, or a step.
        count: images to draw; by default 5,000, or as many as the data allows.
        extractor: the space of features: ``classifier``, trained on the same images and published in the run's folder
            ``evaluation``; ``imagenet``; or a TorchScript file (see :mod:`genscale.evaluation.pretrained`).
        sampling: how images are drawn; by default as the run's recipe says. Its labels and captions are not used.
        seed: of the drawing.

    Returns:
        what :func:`genscale.evaluation.image_scores.score_images` gives, with ``classifier``, its kind and its
        accuracy on held-out images, where there is one; ``training_loss``, ``validation_loss`` and ``gap``, see
        :func:`genscale.evaluation.overfitting.denoising_gap`; and ``recorded``. The closest pairs are also to be seen
        in the run's ``evaluation/closest-pairs.png``.

    Raises:
        UserError: no run, store or checkpoint; fewer images than the metrics need; an extractor that is not there.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    place = pick_device(device)
    path = (run.facts.get("inputs", {}).get("stores") or [run.store])[0]
    training, validation = (StoredImages(path, split) for split in ("train", "validation"))
    sets = choose_sets(training, validation, count)
    objective = load_objective(run, checkpoint, place)
    classes = len(training.described.classes)
    labelled = classes >= 2 and training.labels is not None and bool((training.labels >= 0).any())
    classifier: Extractor | None = None
    facts: dict[str, Any] = {}
    if labelled or extractor == "classifier":
        network, published = publish_classifier(
            run.directory / "evaluation",
            training,
            validation,
            classes=classes,
            data=run.data_fingerprint,
            seed=run.recipe.seed,
            device=place,
            on_progress=lambda done, total: on_progress("training the classifier", done, total, "images"),
        )
        classifier = classifier_extractor(network, published["kind"])
        facts = {"classifier": {"kind": published["kind"], "accuracy": published["accuracy"]}}
    chosen = pretrained_extractor(extractor, place) if classifier is None or extractor != "classifier" else classifier

    intended = intended_classes(objective, training, sets.reference)
    settings = sampling or run.recipe.sampling
    assert isinstance(settings, ImageSampling)  # the recipe has seen to it
    drawn = 0

    def more(images: int) -> None:
        nonlocal drawn
        drawn += images
        on_progress("drawing", drawn, len(sets.reference), "images")

    generated = draw(
        objective,
        training.described,
        settings,
        count=len(sets.reference),
        seed=seed,
        labels=None if intended is None else intended.tolist(),
        captions=training.captions(sets.reference) if told(objective) == "text" else None,
        device=place,
        on_images=more,
    )
    classes_of = classifier if labelled else None
    scores = (
        score_images(generated, intended, training, validation, sets, chosen, classes_of, classes, on_progress) | facts
    )
    on_progress("loss", 0, None, "images")
    streams = [ImageStream(ImageStore.open(path), split, run.recipe.seed) for split in ("train", "validation")]
    compared = min(MOST_COMPARED, len(training), len(validation))
    scores |= denoising_gap(objective, *streams, samples=compared, seed=run.recipe.seed, batch=64, device=place)
    folder = run.directory / "evaluation"
    folder.mkdir(exist_ok=True)
    pairs = [ClosestPair(**pair) for pair in scores["closest_pairs"]]
    write_atomically(folder / "closest-pairs.png", picture_of_pairs(pairs, generated, training))
    scores["recorded"] = _record(run, checkpoint, scores)
    return scores


def picture_of_pairs(pairs: list[ClosestPair], generated: Tensor, training: RealImages) -> bytes:
    """A PNG: generated images above, below each its nearest training image, nearest first."""
    above = generated[[pair.generated for pair in pairs]].cpu()
    below = training.images(np.array([pair.training for pair in pairs])).cpu()
    return png_bytes(grid(to_pixels(torch.cat([above, below])), 2, len(pairs)))


def intended_classes(
    objective: Objective, training: RealImages, reference: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """The class that each image is drawn for: that of a reference image, so that they are as common as in the data."""
    if told(objective) != "class" or training.labels is None:
        return None
    labels = training.labels[reference]
    known = training.labels[training.labels >= 0]
    return np.where(labels >= 0, labels, known[np.arange(len(labels)) % len(known)])


def _record(run: Run, checkpoint: str | int, scores: dict[str, Any]) -> bool:
    """Keep the scores with the run; False where another process holds it or it cannot be written."""
    try:
        with run.lock():
            # Read anew, so that what another process recorded meanwhile is kept.
            facts = Run.open(run.directory).facts
            run.record(**facts | {"image_evaluation": {"checkpoint": checkpoint, **scores}})
    except UserError:
        return False
    return True

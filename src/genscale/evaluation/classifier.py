"""The space in which generated images are compared without any download: that of a classifier of the same real images.

Where images have labels it tells their classes apart; where they have none, by how many quarter turns each was rotated
(Gidaris et al. 2018). It is trained from the seed on the run's own training images, and published with the run:
``evaluation/classifier.safetensors`` and ``.json``, or ``rotation-classifier``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.runtime.files import write_atomically
from genscale.runtime.randomness import generator

IMAGES_SEEN = 180_000
"""In training: three times through 60,000 images."""
MOST_EPOCHS = 30
LARGEST = 64
"""Larger images are made smaller before they are looked at."""
_BATCH = 128
_LEARNING_RATE = 3e-3
_FORMAT = 1


class RealImages(Protocol):
    """What evaluation needs of a split of real images."""

    labels: NDArray[np.int64] | None
    """(images,) the number of each one's class, -1 where it is not known; None where the data has no classes."""

    def __len__(self) -> int: ...

    def images(self, numbers: NDArray[np.int64]) -> Tensor:
        """(numbers, channels, height, width) float32, from -1 to 1."""
        ...


class Classifier(nn.Module):
    """Convolutions that halve the image until it is small, a matrix to the features, and one to the classes.

    Args:
        channels: of the images.
        resolution: their height and width.
        classes: how many it tells apart.
    """

    width = 128
    """Of the features."""

    def __init__(self, channels: int, resolution: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        size, width = min(resolution, LARGEST), 32
        while size > 7 or not layers:
            halved = bool(layers) or size > 14
            layers += _convolution(channels, width, kernel=3 if layers else 5, stride=2 if halved else 1)
            channels, width, size = width, min(2 * width, self.width), -(-size // 2) if halved else size
        # A mean over places instead of this matrix costs 3 points of accuracy on Fashion-MNIST.
        project = nn.Linear(channels * size**2, self.width, bias=False)
        self.body = nn.Sequential(*layers, nn.Flatten(), project, nn.BatchNorm1d(self.width), nn.ReLU())
        self.head = nn.Linear(self.width, classes)

    def features(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, 128)."""
        if images.shape[-1] > LARGEST:
            images = F.interpolate(images, size=(LARGEST, LARGEST), mode="bilinear", antialias=True)
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, classes) logits."""
        return self.head(self.features(images))


def _convolution(channels: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def publish_classifier(
    folder: Path,
    training: RealImages,
    validation: RealImages,
    *,
    classes: int,
    data: str,
    seed: int = 0,
    device: torch.device,
    images_seen: int = IMAGES_SEEN,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a run: read from its folder, or trained and written there.

    Args:
        folder: the run's ``evaluation`` folder.
        classes: how many the data has; below 2, or without labels, rotations are told apart instead.
        data: the fingerprint of the data; a classifier of other data is trained anew.
        images_seen: in training, at most 30 times through all of them.
        on_progress: called with images seen and how many there will be.

    Returns:
        the classifier, on the device and in evaluation mode, and what its ``.json`` says: ``kind``, "classifier" or
        "rotation classifier", and ``accuracy`` on validation images among it.
    """
    labelled = np.zeros(0, dtype=np.int64) if training.labels is None else np.flatnonzero(training.labels >= 0)
    rotations = classes < 2 or len(labelled) < 2
    channels, resolution = training.images(np.zeros(1, dtype=np.int64)).shape[1:3]
    images = len(training) if rotations else len(labelled)
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "kind": "rotation classifier" if rotations else "classifier",
        "channels": channels,
        "resolution": resolution,
        "classes": 4 if rotations else classes,
        "data": data,
        "seed": seed,
        "images_seen": max(1, min(images_seen, MOST_EPOCHS * images) // _BATCH) * _BATCH,
    }
    network = Classifier(channels, resolution, facts["classes"])
    name = facts["kind"].replace(" ", "-")
    written = _read(folder / f"{name}.json", folder / f"{name}.safetensors", facts)
    if written is not None:
        network.load_state_dict(load_file(folder / f"{name}.safetensors"))
        return network.to(device).eval(), written
    _initialise(network, seed)
    numbers = np.arange(len(training)) if rotations else labelled
    _train(network.to(device), training, numbers, rotations, seed, facts["images_seen"], on_progress)
    facts["accuracy"] = _accuracy(network, validation, rotations)
    tensors = save({key: tensor.cpu().contiguous() for key, tensor in network.state_dict().items()})
    facts["checksum"] = _checksum(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.safetensors", tensors)
    write_atomically(folder / f"{name}.json", json.dumps(facts, indent=2) + "\n")
    return network, facts


def _read(description: Path, tensors: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """What was written about the classifier that is expected; None where there is another, none, or a damaged one."""
    try:
        facts = json.loads(description.read_text(encoding="utf-8"))
        intact = facts["checksum"] == _checksum(tensors.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if intact and expected.items() <= facts.items() and "accuracy" in facts else None


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _initialise(network: Classifier, seed: int) -> None:
    """Matrices as He et al. 2015 draw them, each from the seed and its name."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(std=(2 / fan_in) ** 0.5, generator=generator(seed, "evaluation classifier", name))
    nn.init.zeros_(network.head.bias)


def _train(
    network: Classifier,
    training: RealImages,
    numbers: NDArray[np.int64],
    rotations: bool,
    seed: int,
    images_seen: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    steps = images_seen // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.2)
    random = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    network.train()
    for step in range(steps):
        while len(order) < _BATCH:
            order = np.concatenate([order, numbers[random.permutation(len(numbers))]])
        chosen, order = order[:_BATCH], order[_BATCH:]
        images = training.images(chosen)
        if rotations:
            images, labels = _rotated(images, torch.from_numpy(random.integers(4, size=len(chosen))))
        else:
            assert training.labels is not None
            labels = torch.from_numpy(training.labels[chosen])
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_progress is not None:
            on_progress((step + 1) * _BATCH, images_seen)
    network.eval()


def _rotated(images: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Each image turned by its number of quarter turns, and these numbers."""
    every = torch.stack([images.rot90(turn, (2, 3)) for turn in range(4)])  # (4, batch, channels, height, width)
    return every[turns, torch.arange(len(images))], turns


@torch.no_grad()
def _accuracy(network: Classifier, validation: RealImages, rotations: bool, most: int = 10_000) -> float | None:
    """The part of validation images, at most ``most`` spread over the split, that is told right; None without any."""
    device = next(network.parameters()).device
    numbers = np.arange(len(validation))
    if not rotations:
        numbers = numbers[:0] if validation.labels is None else np.flatnonzero(validation.labels >= 0)
    if not len(numbers):
        return None
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(np.int64)]
    right = 0
    for chosen in np.array_split(numbers, -(-len(numbers) // 256)):
        images = validation.images(chosen)
        if rotations:
            images, labels = _rotated(images, torch.from_numpy(chosen % 4))
        else:
            assert validation.labels is not None
            labels = torch.from_numpy(validation.labels[chosen])
        right += int((network(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(numbers)

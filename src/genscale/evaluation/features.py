"""Features of images: the spaces in which generated and real images are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from genscale.evaluation.classifier import Classifier, RealImages

PIXELS = 16
"""Width of images whose pixels are compared."""


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features. :mod:`genscale.evaluation.pretrained` has those that were trained
    elsewhere."""

    name: str
    """Stands in the names of metrics: a distance in one space says nothing about another's."""
    features: Callable[[Tensor], Tensor]
    """(batch, channels, height, width) from -1 to 1, on the device, to (batch, d)."""
    logits: Callable[[Tensor], Tensor] | None
    """From features (batch, d) to (batch, classes) of the data; None where it does not know the data's classes."""
    device: torch.device


class Extracted(NamedTuple):
    features: NDArray[np.float32]
    """(images, d)"""
    classes: NDArray[np.int64] | None
    """(images,) the likeliest class of each; None where the extractor does not know the data's classes."""


def classifier_extractor(network: Classifier, kind: str) -> Extractor:
    """The features of a run's own classifier. ``kind`` is what :func:`publish_classifier` says it is."""
    device = next(network.parameters()).device
    return Extractor(kind, network.features, network.head if kind == "classifier" else None, device)


def pixel_extractor(device: torch.device) -> Extractor:
    """The images themselves, made at most 16 pixels wide by means over squares."""

    def features(images: Tensor) -> Tensor:
        side = -(-images.shape[-1] // PIXELS)
        return F.avg_pool2d(images, side, ceil_mode=True).flatten(1)

    return Extractor("pixels", features, None, device)


def extract(extractor: Extractor, images: Tensor, batch: int = 256) -> Extracted:
    """Features of images in memory, (images, channels, height, width) from -1 to 1 on any device."""
    return _join(_extracted(extractor, part) for part in images.split(batch))


def extract_real(extractor: Extractor, real: RealImages, numbers: NDArray[np.int64], batch: int = 256) -> Extracted:
    """Features of images of a split, by their numbers; at least one."""
    return _join(_extracted(extractor, real.images(part)) for part in _batches(numbers, batch))


def real_features(
    extractor: Extractor, real: RealImages, numbers: NDArray[np.int64], part: int = 4096
) -> Iterator[NDArray[np.float32]]:
    """The same in parts, so that those of a large split are never held together."""
    for some in _batches(numbers, part):
        yield extract_real(extractor, real, some).features


def _batches(numbers: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


@torch.no_grad()
def _extracted(extractor: Extractor, images: Tensor) -> Extracted:
    features = extractor.features(images.to(extractor.device))
    classes = None if extractor.logits is None else extractor.logits(features).argmax(1).cpu().numpy()
    return Extracted(features.float().cpu().numpy(), classes)


def _join(parts: Iterator[Extracted]) -> Extracted:
    features, classes = zip(*parts, strict=True)
    return Extracted(np.concatenate(features), None if classes[0] is None else np.concatenate(classes))

"""How far generated images are from held-out ones, from sums alone: what GAN runs are compared by while they train.

It is the squared maximum mean discrepancy (Gretton et al. 2012) in a feature space that is never trained:

1. a random convolutional network, the same for every run: at each resolution down to 4 pixels, 32 channels of
   leaky-ReLU features, averaged over a 4 x 4 grid of places. Random filters see strokes, textures and layout; Naeem et
   al. (2020, section 5) found such features good enough to compare generators;
2. random Fourier features (Rahimi and Recht 2007) of these, so that the mean of a vector stands for a distribution; the
   kernel is a mixture of Gaussians over widths from fine to coarse.

The images fall into folds, at random by position; products are taken only between means of different folds, which are
independent. So the estimate is unbiased: it is 0 on average, and may be negative, for equal distributions, whatever the
number of images. It depends neither on the batch size nor on the number of ranks. It compares runs on the same data at
the same resolution; it is no measure of quality in any absolute sense.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.runtime.randomness import Rng, generator

FOLDS = 16
_CHANNELS = 32
_GRID = 4
_FREQUENCIES = 512
_FINEST, _COARSEST = 16.0, 0.5
"""Frequencies of the kernels' mixture, in units of 1 / distance of features."""


class MomentSpace:
    """The feature space for images of one shape. A pure function of the shape; it holds nothing that is trained.

    Args:
        channels: of the images.
        resolution: their height and width.
    """

    def __init__(self, channels: int, resolution: int):
        sizes = [resolution]
        while sizes[-1] > _GRID:
            sizes.append(sizes[-1] // 2)
        self._kernels = []
        for level in range(len(sizes)):
            inputs = channels if level == 0 else _CHANNELS
            std = math.sqrt(2 / (inputs * 9))
            kernel = torch.empty(_CHANNELS, inputs, 3, 3)
            self._kernels.append(kernel.normal_(std=std, generator=generator("moments", "kernel", channels, level)))
        width = _CHANNELS * _GRID**2 * len(sizes)
        source = generator("moments", "frequencies", width)
        directions = torch.empty(width, _FREQUENCIES).normal_(std=1 / math.sqrt(width), generator=source)
        spread = torch.rand(_FREQUENCIES, generator=source)
        self._frequencies = directions * _COARSEST * (_FINEST / _COARSEST) ** spread

    def features(self, images: Tensor) -> Tensor:
        """(batch, channels, resolution, resolution) to (batch, 2 x 512) float32, each of length 1."""
        with torch.autocast(images.device.type, enabled=False):
            x, places = images.float(), []
            for level, kernel in enumerate(self._kernels):
                x = F.avg_pool2d(x, 2) if level else x
                x = F.leaky_relu(F.conv2d(x, kernel.to(x.device), padding=1), 0.2)
                places.append(F.adaptive_avg_pool2d(x, _GRID).flatten(1))
            phases = torch.cat(places, dim=1) @ self._frequencies.to(x.device)
            return torch.cat((phases.cos(), phases.sin()), dim=1) / math.sqrt(_FREQUENCIES)


def folds(rng: Rng) -> Tensor:
    """(batch, folds) one-hot float32: the fold of each image."""
    return F.one_hot(rng.integers("fold", FOLDS), FOLDS).float()


def squared_distance(real: Tensor, fake: Tensor, counts: Tensor) -> float:
    """The squared distance of two distributions, from sums over folds that share any factor.

    Args:
        real: (folds, features) sums of the features of real images.
        fake: (folds, features) the same of as many generated ones.
        counts: (folds,) images in each fold.

    Returns:
        The mean of the products of different folds' differences: unbiased. Where all images fell into one fold, its
        square, which is too large by the noise.
    """
    used = counts > 0
    difference = (real - fake)[used] / counts[used, None]  # (used folds, features)
    number = len(difference)
    if number == 1:
        return difference.square().sum().item()
    # Sum over pairs of different folds: the square of the sum without the squares.
    return ((difference.sum(0).square().sum() - difference.square().sum()) / (number * (number - 1))).item()

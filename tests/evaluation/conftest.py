from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor


class Pictures:
    """Real images in memory: each class is a bright square at another place, on noise."""

    def __init__(self, count: int, classes: int, seed: int, resolution: int = 8, labelled: bool = True):
        random = np.random.default_rng(seed)
        classes_of = random.integers(classes, size=count)
        self.labels = classes_of if labelled else None
        images = random.normal(size=(count, 1, resolution, resolution)) * 0.1 - 0.7
        for image, number in zip(images, classes_of, strict=True):
            row, column = divmod(int(number), 2)
            image[:, 1 + 3 * row : 3 + 3 * row, 1 + 3 * column : 4 + 3 * column] = random.uniform(0.5, 0.9)
        self._images = torch.from_numpy(images).float().clamp(-1, 1)

    def __len__(self) -> int:
        return len(self._images)

    def images(self, numbers: np.ndarray) -> Tensor:
        return self._images[numbers]


@pytest.fixture
def pictures() -> Callable[..., Pictures]:
    return Pictures

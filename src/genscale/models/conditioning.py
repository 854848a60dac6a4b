"""What a denoising network is told: how much noise there is, of what class, under which caption, augmented how."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.initialise import fan_in_std
from genscale.models.layers import AttentionMask, Embedding
from genscale.models.transformer import Transformer
from genscale.recipe.image_model import TextEncoder
from genscale.recipe.model import TransformerModel

ConditionKind = Literal["none", "class", "text"]

_RANGE = 1000.0
"""Radians that the fastest feature turns by as the noise level goes from 0 to 1: one for each step of DDPM's 1,000."""


class Words:
    """Captions word by word, to stand in front of what attends to them.

    Args:
        tokens: (batch, words, width of the text encoder).
        shown: (batch, words) bool: which of them are words and not padding.
    """

    def __init__(self, tokens: Tensor, shown: Tensor):
        self.tokens, self.shown = tokens, shown
        self._masks: dict[int, AttentionMask] = {}

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def mask(self, others: int) -> AttentionMask:
        """Who sees whom among the words and as many others: all but padding, which is seen by itself alone. Made once
        for each number of others, and shared by the layers."""
        if others not in self._masks:
            self._masks[others] = words_mask(self.shown, others)
        return self._masks[others]


def words_mask(shown: Tensor, others: int) -> AttentionMask:
    """Who sees whom among words, of which ``shown``, (batch, words) bool, are no padding, and ``others`` after them."""
    documents = F.pad(shown.long(), (0, others), value=1)
    count = documents.shape[1]
    return AttentionMask(count, count, False, documents=documents, device=shown.device)


class Told(NamedTuple):
    """What blocks are told of each image."""

    vector: Tensor
    """(batch, width): all of it in one sum."""
    words: Words | None
    """The captions; None: no image has one."""


class Condition(nn.Module):
    """All that is told: summed into one vector for each image, and a caption also word by word.

    Args:
        described: the images, and so the number of classes or the captions' vocabulary.
        kind: of the condition.
        features: of the noise level, even.
        width: of the vector.
        text: shape of the caption encoder.
        augmentation_width: parameters of the augmentation; 0: none are told.
    """

    def __init__(
        self,
        described: ImageDescription,
        kind: ConditionKind,
        features: int,
        width: int,
        text: TextEncoder,
        augmentation_width: int = 0,
    ):
        super().__init__()
        self.none = len(described.classes)
        """The label that stands for no condition."""
        self.noise = NoiseEmbedding(features, width)
        self.classes = Embedding(self.none + 1, width) if kind == "class" else None
        self.caption = CaptionEncoder(described, text, width) if kind == "text" else None
        # Without a bias, so that zeros, an image as it was, say nothing (Karras et al. 2022, appendix F.2).
        self.augmentation = nn.Linear(augmentation_width, width, bias=False) if augmentation_width else None

    def forward(
        self,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Told:
        """What is told of a batch of images.

        Args:
            noise_level: (batch,) floats of the order of 1.
            labels: (batch,) int64; the number of classes stands for no condition, as None does for all.
            captions: (batch, tokens) int64, 0 for padding; all zeros: no condition, as None for all.
            augmentation: (batch, augmentation_width) floats; zeros: none, as None for all.
        """
        x = self.noise(noise_level)
        if self.classes is not None:
            x = x + self.classes(
                torch.full_like(noise_level, self.none, dtype=torch.long) if labels is None else labels
            )
        words = None
        if self.caption is not None and captions is not None:
            pooled, tokens = self.caption(captions)
            x, words = x + pooled, Words(tokens, captions != 0)
        if self.augmentation is not None and augmentation is not None:
            x = x + self.augmentation(augmentation.to(self.augmentation.weight.dtype))
        return Told(x, words)

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Classes begin as different as noise levels are; else nothing is louder than what it came from."""
        return 0.5 if name == "classes.weight" else fan_in_std(name, size)


def fourier_features(noise_level: Tensor, count: int) -> Tensor:
    """(batch,) numbers to the cosines, then the sines, of ``count`` / 2 multiples of them: (batch, count).

    The multiples fall geometrically from 1,000 by a factor of 10,000: the features of DDPM's step number, for a noise
    level of step / 1,000 (Ho et al. 2020, after Vaswani et al. 2017).
    """
    half = count // 2
    exponents = torch.arange(half, device=noise_level.device, dtype=noise_level.dtype) / half
    angles = noise_level[:, None] * (_RANGE * torch.exp(-math.log(10_000) * exponents))
    return torch.cat((angles.cos(), angles.sin()), -1)


class NoiseEmbedding(nn.Module):
    """A noise level, (batch,), as a vector, (batch, width): two layers over Fourier features of it."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.features = features
        self.up = nn.Linear(features, width)
        self.down = nn.Linear(width, width)

    def forward(self, noise_level: Tensor) -> Tensor:
        # The fastest features need float32: bfloat16 cannot tell neighbouring levels apart.
        wide = noise_level.to(torch.promote_types(noise_level.dtype, torch.float32))
        features = fourier_features(wide, self.features).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))


class CaptionEncoder(nn.Module):
    """A caption, (batch, tokens) int64 with 0 for padding, as a vector, (batch, width), and as one for each token.

    A transformer that reads both ways, trained along, and the mean over its tokens; all zeros become a vector of zeros.
    """

    def __init__(self, described: ImageDescription, text: TextEncoder, width: int):
        super().__init__()
        shape = TransformerModel(
            layers=text.layers,
            width=text.width,
            heads=text.heads,
            context=described.caption_tokens,
            positions="learned",
        )
        self.encoder = Transformer(shape, described.caption_vocabulary, causal=False)
        self.output = nn.Linear(text.width, width, bias=False)

    def forward(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, (batch, width), and (batch, tokens, text width)."""
        real = captions != 0
        hidden = self.encoder.hidden(captions, documents=real.long())  # tokens see tokens, padding sees padding
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        weight = (real / count).to(hidden.dtype)  # (batch, tokens)
        return self.output((weight.unsqueeze(1) @ hidden).squeeze(1)), hidden

    def initial_std(self, name: str, size: torch.Size) -> float:
        return fan_in_std(name, size)

"""What every generator and every discriminator does, whatever its layers: the class, the range, and the logit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genscale.data.description import ImageDescription
from genscale.runtime.errors import UserError

SLOPE = 0.2
"""Of activations where they are negative."""


class Generator(nn.Module):
    """From latents to images. A kind has the layers in between: :meth:`draw`, and how they begin: :meth:`layer_std`.

    Args:
        described: the images that it learns to draw.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.
        embedding: width of a class's vector.
    """

    def __init__(self, described: ImageDescription, conditional: bool, embedding: int):
        super().__init__()
        self.bounded = described.autoencoder is None
        self.embedding = nn.Embedding(len(described.classes) + 1, embedding) if conditional else None
        self.told = embedding if conditional else 0
        """Numbers that are told beside the latents."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, latent) standard normal and (batch,) int64 to (batch, channels, resolution, resolution) float32.

        Pixels are from -1 to 1, which latents of an autoencoder are not. Without the bound a generator must learn to
        hit black and white exactly: on Fashion-MNIST the Fréchet distance was twice as large (docs/experiments.md).
        """
        if self.embedding is not None:
            latents = torch.cat((latents, self.embedding(labels)), dim=1)
        x = _at_least_float32(self.draw(latents))
        return x.tanh() if self.bounded else x

    def draw(self, told: Tensor) -> Tensor:
        """(batch, latent + told) to (batch, channels, resolution, resolution), unbounded."""
        raise NotImplementedError

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Standard deviation of the first values of the parameter ``name``, normal around 0."""
        return 1.0 if name == "embedding.weight" else self.layer_std(name, size)

    def layer_std(self, name: str, size: torch.Size) -> float:
        """The same for the kind's own layers."""
        raise NotImplementedError


class Discriminator(nn.Module):
    """From images to logits, larger where an image looks real. A kind has the layers before the last: :meth:`look`,
    and how they begin: :meth:`layer_std`.

    Args:
        described: the images that it judges.
        conditional: whether the class is given; index ``classes`` stands for a class that is not known.
        embedding: width of a class's vector.
        features: that :meth:`look` gives.
        bias: on the last layer.
    """

    def __init__(self, described: ImageDescription, conditional: bool, embedding: int, features: int, bias: bool):
        super().__init__()
        self.mix = nn.Linear(features, embedding if conditional else 1, bias=bias)
        self.embedding = nn.Embedding(len(described.classes) + 1, embedding) if conditional else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, channels, resolution, resolution) and (batch,) int64 to (batch,) float32."""
        x = _at_least_float32(self.mix(self.look(images)))  # (batch, 1 or embedding)
        # The class's vector is what the features are projected on (Miyato and Koyama 2018).
        return x.squeeze(1) if self.embedding is None else (x * self.embedding(labels)).sum(dim=1)

    def look(self, images: Tensor) -> Tensor:
        """(batch, channels, resolution, resolution) to (batch, features)."""
        raise NotImplementedError

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Standard deviation of the first values of the parameter ``name``, normal around 0."""
        return 1 / math.sqrt(size[1]) if name == "embedding.weight" else self.layer_std(name, size)

    def layer_std(self, name: str, size: torch.Size) -> float:
        """The same for the kind's own layers."""
        raise NotImplementedError


def coarsest(widths: tuple[int, ...], halvings: int, resolution: int, key: str) -> int:
    """Height and width of the coarsest level of images that are halved so many times.

    Raises:
        UserError: they cannot be. ``key`` is that of the levels' widths in ``model``.
    """
    side, rest = divmod(resolution, 2**halvings)
    if rest or side < 2:
        possible = 0
        while resolution % 2 ** (possible + 1) == 0 and resolution >> (possible + 1) >= 2:
            possible += 1
        most = len(widths) - halvings + possible
        fewer = f"at most {most} levels, or " if most else ""
        raise UserError(
            f"model.{key}: {len(widths)} levels halve the images {halvings} times, which {resolution} pixels do not "
            f"allow; give {fewer}another data.resolution"
        )
    return side


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

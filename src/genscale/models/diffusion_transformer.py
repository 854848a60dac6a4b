"""The diffusion transformer: the language model's layers over the patches of an image (Peebles and Xie 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.adaptive_norm import AdaptiveNorm, Modulation
from genscale.models.blocks import Around, Blocks
from genscale.models.conditioning import Condition, ConditionKind, words_mask
from genscale.models.grid_rotary import GridRotary
from genscale.models.initialise import fan_in_std
from genscale.models.layers import Attention, AttentionMask, Embedding, Rotation, in_compute_dtype
from genscale.models.mixture import feed_forward_of
from genscale.recipe.image_model import DiffusionTransformerModel
from genscale.runtime.errors import UserError

_NOISE_FEATURES = 256


class DiffusionBlock(nn.Module):
    """Attention, then feed-forward, each normed as the condition says and added to its input through a gate."""

    def __init__(self, shape: DiffusionTransformerModel, layer: int = 0):
        super().__init__()
        self.modulation = Modulation(shape.width, 6)
        self.attention_norm = AdaptiveNorm(shape.width)
        self.attention = Attention(
            shape.width,
            shape.heads,
            bias=True,
            query_key_value_bias=True,
            query_key_norm=shape.query_key_norm,
            norm_epsilon=1e-6,
        )
        self.feed_forward_norm = AdaptiveNorm(shape.width)
        self.feed_forward = feed_forward_of(shape, layer, bias=True)
        self.dropout = shape.dropout

    def forward(self, x: Tensor, mask: AttentionMask, rotation: Rotation | None, condition: Tensor) -> Tensor:
        """(batch, tokens, width), and (batch, width) of the condition, activated, to (batch, tokens, width)."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)
        y = self.attention(self.attention_norm(x, shift, scale), mask, rotation)
        x = torch.addcmul(x, gate, F.dropout(y, self.dropout, self.training))
        y = self.feed_forward(self.feed_forward_norm(x, shift_2, scale_2))
        return torch.addcmul(x, gate_2, F.dropout(y, self.dropout, self.training))


class DiffusionTransformer(nn.Module):
    """Says of a noisy image what its objective asks for: the noise, the velocity, the image.

    At the start every block is the identity, and the answer is zero.

    Args:
        shape: the recipe's ``model``.
        described: the images.
        conditioning: what it is told of them, besides the noise level.
        augmentation_width: parameters of the augmentation that it is told; 0: none.

    Raises:
        UserError: the patch does not divide the resolution.
    """

    def __init__(
        self,
        shape: DiffusionTransformerModel,
        described: ImageDescription,
        conditioning: ConditionKind = "none",
        augmentation_width: int = 0,
    ):
        super().__init__()
        if described.resolution % shape.patch:
            raise UserError(
                f"model.patch: {shape.patch} does not divide the images' resolution of {described.resolution} "
                f"(data.resolution); {_divisors(described.resolution)} do"
            )
        self.shape, self.conditioning = shape, conditioning
        side, pixels = described.resolution // shape.patch, described.channels * shape.patch**2
        self.condition = Condition(
            described, conditioning, _NOISE_FEATURES, shape.width, shape.text_encoder, augmentation_width
        )
        self.input = nn.Linear(pixels, shape.width)
        self.caption_input = nn.Linear(shape.text_encoder.width, shape.width) if conditioning == "text" else None
        self.position_embedding = Embedding(side**2, shape.width) if shape.positions == "learned" else None
        self.rotary = GridRotary(shape.width_of_head) if shape.positions == "rotary" else None
        self.blocks = Blocks(DiffusionBlock(shape, layer) for layer in range(shape.layers))
        self.modulation = Modulation(shape.width, 2)
        self.norm = AdaptiveNorm(shape.width)
        self.output = nn.Linear(shape.width, pixels)

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """(batch, channels, height, width) to the same; the other arguments are those of ``Condition.forward``."""
        inputs = {"labels": labels, "captions": captions, "augmentation": augmentation}
        y, condition = self.enter(x, noise_level, **inputs)
        y = self.blocks(y, condition, self.around(y.dtype, x, noise_level, **inputs))
        return self.leave(y, condition, x, noise_level, **inputs)

    # In parts, for pipelines: see genscale.models.blocks.Stacked

    first = ("condition", "input", "caption_input", "position_embedding")
    last = ("modulation", "norm", "output")
    conditioned = True

    def enter(
        self,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What enters the blocks: (batch, tokens, width), a caption's words before the patches, and the condition,
        (batch, width), activated. The arguments are those of :meth:`forward`."""
        told = self.condition(noise_level, labels, captions, augmentation)
        condition = F.silu(told.vector)
        y = self.input(patches_of(x, self.shape.patch))  # (batch, rows x columns, width)
        if self.position_embedding is not None:
            y = y + self.position_embedding.weight
        y, condition = in_compute_dtype(y), in_compute_dtype(condition)
        if self.caption_input is not None and told.words is not None:  # attended to like patches
            y = torch.cat((self.caption_input(told.words.tokens).to(y.dtype), y), dim=1)
        return y, condition

    def around(
        self,
        dtype: torch.dtype,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Around:
        """What the blocks are told besides: the arguments are those of :meth:`forward`."""
        rows, columns = (size // self.shape.patch for size in x.shape[2:])
        rotation = None if self.rotary is None else self.rotary(rows, columns, x.device, dtype)
        before = self._words(captions)
        if captions is None or not before:
            mask = AttentionMask(rows * columns, rows * columns, causal=False, device=x.device)
        else:
            mask = words_mask(captions != 0, rows * columns)
            rotation = None if rotation is None else unturned_before(rotation, before)
        return Around([mask] * self.shape.layers, rotation)

    def leave(
        self,
        y: Tensor,
        condition: Tensor,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """From what the blocks gave to an answer in the form of ``x``."""
        y = self.output(self.norm(y[:, self._words(captions) :], *self.modulation(condition)))
        return image_of(y, self.shape.patch, x.shape[2] // self.shape.patch).to(x.dtype)

    def _words(self, captions: Tensor | None) -> int:
        """Tokens of the sequence that are a caption's."""
        return 0 if captions is None or self.conditioning != "text" else captions.shape[1]

    def initial_std(self, name: str, size: torch.Size) -> float:
        """The answer begins at zero; the rest keeps its input's variance."""
        if name == "output.weight":
            return 0.0
        if ".experts." in name:  # a stack of matrices
            return fan_in_std(name, size[1:])
        return 0.02 if name == "position_embedding.weight" else fan_in_std(name, size)


def unturned_before(rotation: Rotation, count: int) -> Rotation:
    """A rotation for ``count`` more tokens, in front of the others, that stay as they are."""
    cosines, sines = rotation
    return F.pad(cosines, (0, 0, count, 0), value=1.0), F.pad(sines, (0, 0, count, 0))


def patches_of(images: Tensor, patch: int) -> Tensor:
    """(batch, channels, height, width) to (batch, patches, channels x patch x patch), row by row."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (b, c, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def image_of(patches: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse: (batch, patches, channels x patch x patch) to (batch, channels, height, width)."""
    x = patches.unflatten(1, (rows, -1)).unflatten(3, (-1, patch, patch))  # (b, rows, columns, c, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _divisors(number: int) -> str:
    *most, last = (str(size) for size in range(1, number // 2 + 1) if number % size == 0)
    return f"{', '.join(most)} and {last}" if most else last

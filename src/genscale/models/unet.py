"""The UNet with residual blocks and attention (Ho et al. 2020; Dhariwal and Nichol 2021).

The same network as diffusers' ``UNet2DModel`` with ``resnet_time_scale_shift="scale_shift"``, layer by layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.blocks import Recompute, run_block
from genscale.models.conditioning import Condition, ConditionKind, Told
from genscale.models.group_norm import GroupNorm
from genscale.models.initialise import fan_in_std
from genscale.models.layers import Attention, in_compute_dtype
from genscale.models.upsample import Upsample
from genscale.recipe.image_model import UNetModel
from genscale.runtime.errors import UserError

_MOST_GROUPS = 32


class ResidualBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, added to the input; the second norm is told the condition."""

    def __init__(self, inputs: int, outputs: int, told: int, groups: int, dropout: float):
        super().__init__()
        self.norm_1 = GroupNorm(groups, inputs, activated=True)
        self.convolution_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(told, 2 * outputs)
        self.norm_2 = GroupNorm(groups, outputs, activated=True)
        self.convolution_2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, inputs, height, width), (batch, told) activated, to (batch, outputs, height, width)."""
        y = self.convolution_1(self.norm_1(x))
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        y = self.convolution_2(F.dropout(self.norm_2(y, scale, shift), self.dropout, self.training))
        return y + (x if self.shortcut is None else self.shortcut(x))


class ImageAttention(nn.Module):
    """Attention of every pixel to all, and to the caption's words, added to the input."""

    def __init__(self, channels: int, head_width: int, groups: int, caption_width: int | None):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.caption_input = nn.Linear(caption_width, channels) if caption_width else None
        self.attention = Attention(channels, channels // head_width, bias=True, query_key_value_bias=True)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(batch, channels, height, width) to the same."""
        y = self.norm(x).flatten(2).transpose(1, 2)  # (batch, pixels, channels)
        if self.caption_input is None or told.words is None:
            y = self.attention(y)
        else:
            mask = told.words.mask(y.shape[1])
            y = torch.cat((self.caption_input(told.words.tokens).to(y.dtype), y), dim=1)
            y = self.attention(y, mask)[:, len(told.words) :]
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class UNetBlock(nn.Module):
    """A residual block and, at some levels, attention."""

    def __init__(
        self, inputs: int, outputs: int, told: int, shape: UNetModel, attends: bool, caption_width: int | None
    ):
        super().__init__()
        groups = math.gcd(_MOST_GROUPS, shape.width)
        self.residual = ResidualBlock(inputs, outputs, told, groups, shape.dropout)
        self.attention = ImageAttention(outputs, shape.head_width, groups, caption_width) if attends else None

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height, width); the vector that is told is activated."""
        x = self.residual(x, told.vector)
        return x if self.attention is None else self.attention(x, told)


class UNet(nn.Module):
    """Says of a noisy image what its objective asks for: the noise, the velocity, the image.

    On the way down each level keeps what its blocks give; on the way up one block more than that takes it in again. At
    the start every residual branch is closed, and the answer is zero.

    Args:
        shape: the recipe's ``model``.
        described: the images.
        conditioning: what it is told of them, besides the noise level.
        augmentation_width: parameters of the augmentation that it is told; 0: none.

    Attributes:
        recompute: what blocks recompute in the backward instead of keeping it: see genscale.models.blocks.

    Raises:
        UserError: the resolution cannot be halved as often as the shape has levels.
    """

    def __init__(
        self,
        shape: UNetModel,
        described: ImageDescription,
        conditioning: ConditionKind = "none",
        augmentation_width: int = 0,
    ):
        super().__init__()
        _check_halvings(len(shape.multipliers), described.resolution)
        self.shape = shape
        self.recompute: Recompute = "none"
        told = 4 * shape.width
        caption_width = shape.text_encoder.width if conditioning == "text" else None
        self.condition = Condition(described, conditioning, shape.width, told, shape.text_encoder, augmentation_width)

        def block(inputs: int, outputs: int, attends: bool) -> UNetBlock:
            return UNetBlock(inputs, outputs, told, shape, attends, caption_width)

        self.input = nn.Conv2d(described.channels, shape.width, 3, padding=1)
        channels = shape.width
        kept = [channels]  # channels of what the way down keeps
        self.down, self.downsamples = nn.ModuleList(), nn.ModuleList()
        widths = [shape.width * multiplier for multiplier in shape.multipliers]
        for level, width in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(shape.blocks):
                blocks.append(block(channels, width, level in shape.attention))
                channels = width
                kept.append(channels)
            self.down.append(blocks)
            if level < len(widths) - 1:
                self.downsamples.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                kept.append(channels)
        self.middle = nn.ModuleList(block(channels, channels, attends) for attends in (True, False))
        self.up, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(shape.blocks + 1):
                blocks.append(block(channels + kept.pop(), width, level in shape.attention))
                channels = width
            self.up.append(blocks)
            if level:
                self.upsamples.append(Upsample(channels))
        self.norm = GroupNorm(math.gcd(_MOST_GROUPS, shape.width), channels, activated=True)
        self.output = nn.Conv2d(channels, described.channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        labels: Tensor | None = None,
        captions: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """(batch, channels, height, width) to the same; the other arguments are those of ``Condition.forward``."""
        told = self.condition(noise_level, labels, captions, augmentation)
        told = told._replace(vector=in_compute_dtype(F.silu(told.vector)))
        y = self.input(x)
        kept = [y]
        for level, blocks in enumerate(self.down):
            for block in blocks.children():
                y = self._run(block, y, told)
                kept.append(y)
            if level < len(self.downsamples):
                y = self.downsamples[level](y)
                kept.append(y)
        for block in self.middle:
            y = self._run(block, y, told)
        for level, blocks in enumerate(self.up):
            for block in blocks.children():
                y = self._run(block, torch.cat((y, kept.pop()), dim=1), told)
            if level < len(self.upsamples):
                y = self.upsamples[level](y)
        return self.output(self.norm(y)).to(x.dtype)

    def _run(self, block: nn.Module, x: Tensor, told: Told) -> Tensor:
        return run_block(block, self.recompute if self.training and is_grad_enabled() else "none", x, told)

    def initial_std(self, name: str, size: torch.Size) -> float:
        """Each branch and the answer begin at zero; the rest keeps its input's variance."""
        closed = name.endswith(("convolution_2.weight", "attention.output.weight")) or name == "output.weight"
        return 0.0 if closed else fan_in_std(name, size)


def _check_halvings(levels: int, resolution: int) -> None:
    halvings = levels - 1
    if resolution % 2**halvings == 0:
        return
    most = 1
    while resolution % 2**most == 0:
        most += 1
    raise UserError(
        f"model.multipliers: {levels} levels halve the images {halvings} times, which a resolution of {resolution} "
        f"(data.resolution) does not allow; give at most {most}, or another resolution"
    )

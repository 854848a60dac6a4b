"""Our UNet as diffusers' ``UNet2DModel``: the same network under other names."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from genscale.data.description import ImageDescription
from genscale.recipe.image_model import UNetModel

_NAMES = (
    (r"^input\.", "conv_in."),
    (r"^output\.", "conv_out."),
    (r"^norm\.", "conv_norm_out."),
    (r"^condition\.noise\.up\.", "time_embedding.linear_1."),
    (r"^condition\.noise\.down\.", "time_embedding.linear_2."),
    (r"^condition\.classes\.", "class_embedding."),
    (r"^downsamples\.(\d+)\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"^upsamples\.(\d+)\.convolution\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"^(down|up)\.(\d+)\.(\d+)\.residual\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^middle\.(\d+)\.residual\.", r"mid_block.resnets.\1."),
    (r"^middle\.(\d+)\.attention\.", r"mid_block.attentions.\1."),
    (r"(resnets\.\d+)\.(norm|convolution)_(\d)\.", r"\1.\2\3."),
    (r"(resnets\.\d+)\.convolution(\d)\.", r"\1.conv\2."),
    (r"(resnets\.\d+)\.modulation\.", r"\1.time_emb_proj."),
    (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.attention\.(query|key|value)\.", lambda found: f"{found[1]}.to_{found[2][0]}."),
    (r"(attentions\.\d+)\.attention\.output\.", r"\1.to_out.0."),
)


def unet_config(shape: UNetModel, described: ImageDescription, knows_classes: bool) -> dict[str, Any]:
    """The configuration under which ``UNet2DModel`` computes what our UNet does, for time steps of 1,000 times the
    noise level; the label after the last class is none."""
    groups = math.gcd(32, shape.width)
    attends = [level in shape.attention for level in range(len(shape.multipliers))]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": described.resolution,
        "in_channels": described.channels,
        "out_channels": described.channels,
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "block_out_channels": [shape.width * multiplier for multiplier in shape.multipliers],
        "layers_per_block": shape.blocks,
        "down_block_types": ["AttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "up_block_types": ["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
        "attention_head_dim": shape.head_width,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift",
        "dropout": shape.dropout,
        "num_class_embeds": len(described.classes) + 1 if knows_classes else None,
    }


def unet_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our UNet's weights under the names of ``UNet2DModel``, without what says how images were augmented: at zeros it
    adds nothing."""
    return {_renamed(name): tensor for name, tensor in weights.items() if name != "condition.augmentation.weight"}


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name

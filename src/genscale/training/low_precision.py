"""Matrix products in fp8 through torchao (Micikevicius et al. 2022, "FP8 formats for deep learning")."""

from __future__ import annotations

import torch
from torch import nn

from genscale.models.attention import Attention
from genscale.models.feed_forward import FeedForward
from genscale.runtime.device import has_fp8_products
from genscale.runtime.errors import UserError

_MULTIPLE = 16
"""Of both dimensions of a matrix: what fp8 products of accelerators ask for."""


def use_fp8(network: nn.Module, device: torch.device, imitate: bool = False) -> int:
    """Let the blocks' attention and feed-forward layers multiply in fp8, in place; call before compiling or sharding.

    Inputs and weights are cast to e4m3 and gradients to e5m2 before each product, each tensor scaled by its largest
    element. Weights stay the same parameters, under the same names. Embedding, head, what surrounds the blocks, what
    routes to experts and what modulates by a condition keep their precision, and so do matrices with a dimension that
    is no multiple of 16.

    Args:
        network: its blocks are in lists, so that their layers' names have numbers.
        device: that it runs on.
        imitate: cast to fp8 but multiply in fp32, on any device, to see what fp8 does to a loss.

    Returns:
        The number of layers that now multiply in fp8; raises UserError where there would be none.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "layout.precision: fp8 needs torchao, which is not installed: pip install 'genscale[torchao]'"
        ) from None
    if not imitate and not has_fp8_products(device):
        raise UserError(f"layout.precision: fp8 products are not in this device ({device.type}), set it to 'auto'")
    chosen = {
        f"{name}.{child_name}"
        for name, module in network.named_modules()
        if isinstance(module, Attention | FeedForward) and any(part.isdecimal() for part in name.split("."))
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear) and all(size % _MULTIPLE == 0 for size in child.weight.shape)
    }
    if not chosen:
        raise UserError(
            f"layout.precision: fp8 needs dimensions that are multiples of {_MULTIPLE}, as no block's linear layer has"
        )
    # Padded: the gradient of a weight sums over tokens, whose number need not be a multiple either.
    config = Float8LinearConfig(emulate=imitate, pad_inner_dim=not imitate)
    convert_to_float8_training(network, module_filter_fn=lambda _, name: name in chosen, config=config)
    return len(chosen)

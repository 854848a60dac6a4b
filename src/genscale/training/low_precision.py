"""Matrix products in fp8 through torchao (Micikevicius et al. 2022, "FP8 formats for deep learning")."""

from __future__ import annotations

import torch
from torch import nn

from genscale.runtime.errors import UserError

_MULTIPLE = 16
"""Of both dimensions of a matrix: what fp8 products of accelerators ask for."""


def use_fp8(network: nn.Module, device: torch.device, imitate: bool = False) -> int:
    """Let the linear layers of numbered blocks multiply in fp8, in place; call before compiling or sharding.

    Inputs and weights are cast to e4m3 and gradients to e5m2 before each product, each tensor scaled by its largest
    element. Weights stay the same parameters, under the same names. Embedding, head and what surrounds the blocks keep
    their precision, and so do matrices with a dimension that is no multiple of 16.

    Args:
        network: its blocks are in module lists.
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
    chosen = {name for name, module in network.named_modules() if _fits(name, module)}
    if not chosen:
        raise UserError(
            f"layout.precision: fp8 needs dimensions that are multiples of {_MULTIPLE}, as no block's linear layer has"
        )
    convert_to_float8_training(
        network, module_filter_fn=lambda _, name: name in chosen, config=Float8LinearConfig(emulate=imitate)
    )
    return len(chosen)


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies matrices in fp8: from capability 8.9 (Ada, Hopper)."""
    if device.type == "cpu":
        return False
    capability = getattr(torch.get_device_module(device), "get_device_capability", lambda _: None)(device)
    return isinstance(capability, tuple) and capability >= (8, 9)


def _fits(name: str, module: nn.Module) -> bool:
    """Whether it is a linear layer somewhere below ``blocks.3`` or the like, with dimensions that fit."""
    in_block = any(part.isdecimal() for part in name.split(".")[:-1])
    return in_block and type(module) is nn.Linear and all(size % _MULTIPLE == 0 for size in module.weight.shape)

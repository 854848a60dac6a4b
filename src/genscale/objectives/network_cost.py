"""What one sample costs in a network: operations, and memory kept for the backward. Counted on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Of the forward pass of what was put in."""

    flops: float
    """Multiplications and additions of matrix products, convolutions and attention."""
    kept_elements: int
    """Floating-point numbers kept for the backward, parameters aside."""
    kept_bytes: int
    """What else is kept: masks, indices."""


def cost(build: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]]) -> Cost:
    """Of a network that ``build`` makes, given what ``inputs`` makes; both are called where tensors hold no data."""
    with FakeTensorMode():
        network, given = build().train(), inputs()
        # Flops are those of plain attention: the counter knows no fused kernel of the CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(**given)
        elements, rest = _kept(network, given)
    return Cost(counter.get_total_flops(), elements, rest)


def _kept(network: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """Elements of floating point, and bytes of other kinds."""
    kept: dict[int, Tensor] = {}  # by storage, so that views count once

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(**inputs)
    own = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
    elements = rest = 0
    for storage, tensor in kept.items():
        size = tensor.untyped_storage().nbytes()
        if storage in own:
            continue
        if tensor.is_floating_point():
            elements += size // tensor.element_size()
        else:
            rest += size
    del outputs  # until here it kept the storages, and so their numbers, alive
    return elements, rest


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

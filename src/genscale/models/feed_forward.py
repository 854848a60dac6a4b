"""The position-wise feed-forward layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FeedForwardKind = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"]


class FeedForward(nn.Module):
    """From ``width`` to ``hidden`` and back.

    ``swiglu`` and ``geglu`` (with the tanh form of GELU, as in Gemma) gate the hidden layer (Shazeer 2020);
    ``relu_squared`` is So et al. 2021.

    Args:
        width: of the input and the output.
        hidden: of the layer between.
        kind: the activation.
        bias: on every projection.
    """

    def __init__(self, width: int, hidden: int, kind: FeedForwardKind = "swiglu", bias: bool = False):
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(width, hidden, bias=bias) if kind in ("swiglu", "geglu") else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(activated(self.kind, hidden, None if self.gate is None else self.gate(x)))


def activated(kind: FeedForwardKind, hidden: Tensor, gate: Tensor | None) -> Tensor:
    """The hidden layer after its activation, which is the gate's where there is one."""
    if gate is not None:
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * hidden
    if kind == "relu_squared":
        return _ReluSquared.apply(hidden)
    return F.gelu(hidden, approximate="tanh" if kind == "gelu_tanh" else "none")


class _ReluSquared(torch.autograd.Function):
    """relu(x)^2 in two passes over memory each way, and with only x kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        positive = torch.relu(x)
        return positive.mul_(positive)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        positive = torch.relu(ctx.saved_tensors[0])
        return torch.addcmul(positive.new_zeros(()), positive, gradient, value=2)

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
        if self.gate is not None:
            gate = self.gate(x)
            hidden = (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * hidden
        elif self.kind == "relu_squared":
            hidden = _ReluSquared.apply(hidden)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return self.down(hidden)


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

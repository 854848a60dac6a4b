"""Each activation against its formula."""

import math

import pytest
import torch

from genscale.models.feed_forward import FeedForward

NORMAL_CDF = torch.distributions.Normal(0, 1).cdf
FORMULAS = {
    "swiglu": lambda up, gate: gate * torch.sigmoid(gate) * up,
    "geglu": lambda up, gate: FORMULAS["gelu_tanh"](gate, None) * up,
    "gelu": lambda up, gate: up * NORMAL_CDF(up),
    "gelu_tanh": lambda up, gate: 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))),
    "relu_squared": lambda up, gate: torch.where(up > 0, up * up, 0.0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FORMULAS)
def test_feed_forward_equals_its_formula(kind, bias):
    torch.manual_seed(0)
    layer = FeedForward(6, 10, kind, bias).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)

    def project(name, x):
        linear = getattr(layer, name)
        if linear is None:
            return None
        return x @ linear.weight.T + (linear.bias if bias else 0)

    expected = project("down", FORMULAS[kind](project("up", x), project("gate", x)))
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=1e-9)


def test_squared_relu_has_right_first_and_second_derivatives():
    layer = FeedForward(3, 5, "relu_squared").double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))

"""Norms against float64 arithmetic written out."""

import pytest
import torch

from genscale.models.normalisation import Norm


def reference(x, weight, bias, kind, epsilon):
    x = x.double()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1.2e-2)])
def test_norm_equals_float64_arithmetic(kind, scale, dtype, tolerance):
    torch.manual_seed(0)
    norm = Norm(48, kind, 1e-3, scale=scale, bias=True)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (3 * torch.randn(5, 700, 48)).to(dtype).requires_grad_()
    weights = torch.randn(5, 700, 48).to(dtype)
    y = norm(x)
    y.backward(weights)

    exact = [None if p is None else p.detach().double().requires_grad_() for p in (x, norm.weight, norm.bias)]
    expected = reference(*exact, kind, 1e-3)
    expected.backward(weights.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=3 * tolerance, rtol=tolerance)
    for parameter, reference_parameter in zip((x, norm.weight, norm.bias), exact, strict=True):
        if reference_parameter is not None:
            found, wanted = parameter.grad.double(), reference_parameter.grad
            assert (found - wanted).norm() < tolerance * wanted.norm()


def test_rms_norm_has_right_first_and_second_derivatives():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    norm = Norm(6, "rms").double()
    norm.weight.data.uniform_(0.5, 2)

    def with_scale(x, scale):
        return torch.func.functional_call(norm, {"weight": scale}, (x,))

    assert torch.autograd.gradcheck(with_scale, (x, norm.weight))
    assert torch.autograd.gradgradcheck(with_scale, (x, norm.weight))


def test_rms_norm_gives_gradients_per_sample():
    norm, x = Norm(6, "rms"), torch.randn(4, 3, 6)

    def loss(weights, sample):
        return torch.func.functional_call(norm, weights, (sample,)).square().sum()

    weights = {"weight": torch.rand(6)}
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    alone = torch.stack([torch.func.grad(loss)(weights, sample)["weight"] for sample in x])
    torch.testing.assert_close(together, alone)


def test_centred_scale_is_the_difference_from_one():
    plain, centred = Norm(8), Norm(8, centred=True)
    assert not centred.weight.any()  # it starts as the identity
    centred.weight.data.fill_(0.25)
    plain.weight.data.fill_(1.25)
    x = torch.randn(2, 8)
    assert torch.equal(plain(x), centred(x))


def test_a_norm_keeps_its_inputs_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Norm(8)(torch.randn(2, 8)).dtype == torch.float32
        assert Norm(8, "layer")(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiled_form_is_the_same_function():
    # The path that torch.compile and accelerators take.
    x, norm = torch.randn(2, 5, 8), Norm(8)
    norm.weight.data.uniform_(0.5, 2)
    expected = torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-6)

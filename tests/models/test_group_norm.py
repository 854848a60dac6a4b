"""Group normalisation with its scale, shift and activation, against the formula."""

import pytest
import torch

from genscale.models.group_norm import GroupNorm


def formula(norm, x, scale=None, shift=None):
    """Group by group, in plain arithmetic."""
    groups = x.chunk(norm.num_groups, dim=1)
    centred = [group - group.mean((1, 2, 3), keepdim=True) for group in groups]
    y = torch.cat([c / (c.square().mean((1, 2, 3), keepdim=True) + norm.eps).sqrt() for c in centred], dim=1)
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    if scale is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return y * torch.sigmoid(y) if norm.activated else y


def layer(activated=True, dtype=torch.float64):
    norm = GroupNorm(3, 6, activated).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
        norm.bias.normal_(generator=torch.Generator().manual_seed(1))
    return norm


def inputs(dtype=torch.float64, batch=2, size=4):
    torch.manual_seed(2)
    shapes = ((batch, 6, size, size + 1), (batch, 6), (batch, 6))
    return [(torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_formula(told, memory_format):
    norm = layer()
    x, *rest = inputs()
    given = [x, *rest] if told else [x]
    found = norm(x.contiguous(memory_format=memory_format), *given[1:])
    expected = formula(norm, *given)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(expected).contiguous(memory_format=memory_format)
    wanted = [*given, norm.weight, norm.bias]
    for one, other in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_without_activation_it_is_the_norm_alone():
    norm = layer(activated=False)
    x, *_ = inputs()
    torch.testing.assert_close(norm(x), formula(norm, x), atol=1e-12, rtol=1e-12)


def test_bfloat16_stays_bfloat16_and_near_the_formula_in_its_gradients_too():
    # Also under autocast, which would turn the result into float32 on some devices.
    wide, norm = layer(), layer(dtype=torch.float32)
    given = inputs(torch.bfloat16, batch=40, size=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(*given)
    assert found.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = formula(wide, *exact)
    upstream = torch.randn_like(expected).bfloat16()
    pairs = zip(
        (found, *torch.autograd.grad(found, [*given, norm.weight, norm.bias], upstream)),
        (expected, *torch.autograd.grad(expected, [*exact, wide.weight, wide.bias], upstream.double())),
        strict=True,
    )
    for one, other in pairs:
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_it_keeps_nothing_as_large_as_the_image_but_its_input():
    norm, sizes = layer(), []
    x, scale, shift = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        norm(x, scale, shift)
    assert sorted(sizes)[-2:] == [scale.numel(), x.numel()]


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, *_ = inputs()
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(layer()(x).sum(), x, create_graph=True)

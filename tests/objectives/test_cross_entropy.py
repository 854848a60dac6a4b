"""Cross entropy against its closed form in fp64."""

import pytest
import torch
import torch.nn.functional as F

from genscale.objectives import cross_entropy as module
from genscale.objectives.cross_entropy import cross_entropy


def closed_form(logits, targets, weights, smoothing, z_loss):
    """The loss written out in fp64: smoothed cross entropy, plain cross entropy, squared log-partition."""
    logits = logits.double()
    log_partition = logits.exp().sum(-1).log()
    wanted = F.one_hot(targets, logits.shape[-1]).double() * (1 - smoothing) + smoothing / logits.shape[-1]
    weights = torch.ones(targets.shape, dtype=torch.float64) if weights is None else weights.double()
    smoothed = -(wanted * (logits - log_partition[..., None])).sum(-1)
    plain = log_partition - logits.gather(-1, targets[..., None])[..., 0]
    squared = log_partition**2
    return (weights * (smoothed + z_loss * squared)).sum(), (weights * plain).sum(), (weights * squared).sum()


def example(vocabulary=37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 11, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(vocabulary, (4, 11), generator=generator)
    weights = torch.rand(4, 11, generator=generator) * (torch.rand(4, 11, generator=generator) < 0.7)
    return logits.requires_grad_(), targets, weights


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
@pytest.mark.parametrize("weighted", ["all", "mask", "factors"])
def test_sums_and_gradient_equal_the_closed_form(monkeypatch, smoothing, z_loss, weighted):
    monkeypatch.setitem(module._BLOCK, "cpu", 7 * 37)  # several blocks, the last one ragged
    logits, targets, weights = example()
    weights = {"all": None, "mask": weights > 0, "factors": weights}[weighted]
    ours = cross_entropy(logits, targets, weights, smoothing, z_loss)
    (gradient,) = torch.autograd.grad(3.7 * ours.total, logits)
    expected = closed_form(logits, targets, weights, smoothing, z_loss)
    (expected_gradient,) = torch.autograd.grad(3.7 * expected[0], logits)
    for sum_, expected_sum in zip(ours, expected, strict=True):
        torch.testing.assert_close(sum_, expected_sum.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    logits, targets, weights = example(vocabulary=5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, weights, 0.1, 1e-2).total, (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32_whatever_the_autocast(dtype):
    logits, targets, weights = example(vocabulary=4096, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = cross_entropy(logits, targets, weights, 0.1, 1e-4)
    assert ours.total.dtype == torch.float32
    expected = closed_form(logits.detach(), targets, weights, 0.1, 1e-4)
    for sum_, expected_sum in zip(ours, expected, strict=True):
        assert sum_.item() == pytest.approx(expected_sum.item(), rel=1e-5)
    exact = logits.detach().double().requires_grad_()
    closed_form(exact, targets, weights, 0.1, 1e-4)[0].backward()
    ours.total.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-7, atol=1e-6)


def test_fp16_gradients_survive_under_a_loss_scale():
    """A probability of 1e-9 is below fp16, but not once the loss scale has multiplied it."""
    logits = torch.tensor([[20.7, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (2.0**16 * cross_entropy(logits, torch.tensor([0])).total).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2**16 * 1.02e-9, rel=0.05)


def test_very_unlikely_targets_are_exact():
    logits = torch.tensor([[0.0, 300.0, -200.0]], requires_grad=True)
    assert cross_entropy(logits, torch.tensor([2])).plain.item() == 500.0

"""Linear layers in fp8: which are converted, how near they stay, and what is said where it cannot be."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn

from genscale.models.feed_forward import FeedForward
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel
from genscale.runtime.device import has_fp8_products
from genscale.runtime.errors import UserError
from genscale.training import low_precision
from genscale.training.low_precision import use_fp8

CPU = torch.device("cpu")


def transformer(width: int = 32, hidden: int = 64) -> Transformer:
    torch.manual_seed(0)
    shape = TransformerModel(layers=2, width=width, heads=2, context=16, hidden=hidden)
    network = Transformer(shape, vocabulary=48)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return network


def loss_and_gradients(network: nn.Module) -> tuple[float, dict[str, Tensor]]:
    tokens = torch.randint(48, (4, 17), generator=torch.Generator().manual_seed(0))
    logits = network(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    names, parameters = zip(*network.named_parameters(), strict=True)
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_blocks_linear_layers_multiply_in_fp8_and_the_rest_as_before():
    pytest.importorskip("torchao")
    network = transformer()
    before = network.state_dict(keep_vars=True)
    exact_loss, exact = loss_and_gradients(network)
    assert use_fp8(network, CPU, imitate=True) == 2 * 7
    after = network.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before), "weights are the same parameters"
    loss, gradients = loss_and_gradients(network)
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=0.02)
    error = sum((gradients[name] - exact[name]).square().sum() for name in exact)
    norm = sum(gradient.square().sum() for gradient in exact.values())
    assert (
        0.01 < (error / norm).sqrt() < 0.3
    )  # 0.19 to 0.23 over four draws of weights; of single parameters 0.06 to 0.4


def rounded(x: Tensor, form: torch.dtype) -> Tensor:
    """x as its fp8 form has it, scaled so that its largest element is the form's largest."""
    scale = torch.finfo(form).max / x.abs().max()
    return (x * scale).to(form).float() / scale


def test_one_layer_and_its_gradients_are_products_of_rounded_matrices():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    blocks = nn.ModuleList([FeedForward(64, 48, "gelu")])
    x, gradient = torch.randn(32, 64, requires_grad=True), torch.randn(32, 48)
    exact = blocks[0].up(x).detach()
    assert use_fp8(blocks, CPU, imitate=True) == 2
    weight = blocks[0].up.weight
    output = blocks[0].up(x)
    of_x, of_weight = torch.autograd.grad(output, (x, weight), gradient)
    inputs, matrix = rounded(x.detach(), torch.float8_e4m3fn), rounded(weight.detach(), torch.float8_e4m3fn)
    outputs = rounded(gradient, torch.float8_e5m2)
    torch.testing.assert_close(output, inputs @ matrix.T)
    torch.testing.assert_close(of_x, outputs @ matrix)
    torch.testing.assert_close(of_weight, outputs.T @ inputs)
    assert 0.001 < (output - exact).norm() / exact.norm() < 0.06  # e4m3 has three bits behind the point


def test_layers_of_no_block_and_what_routes_keep_their_precision():
    pytest.importorskip("torchao")
    network = nn.ModuleDict({"before": FeedForward(32, 32), "blocks": nn.ModuleList([nn.Linear(32, 32)])})
    with pytest.raises(UserError, match="multiples of 16"):
        use_fp8(network, CPU, imitate=True)


def test_dimensions_that_do_not_fit_keep_their_precision():
    pytest.importorskip("torchao")
    assert use_fp8(transformer(hidden=56), CPU, imitate=True) == 2 * 4  # the attention's alone
    with pytest.raises(UserError, match="multiples of 16"):
        use_fp8(transformer(width=24, hidden=40), CPU, imitate=True)


def test_a_device_without_fp8_products_is_named(monkeypatch):
    stand_in = types.ModuleType("torchao.float8")
    stand_in.Float8LinearConfig = stand_in.convert_to_float8_training = None
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)
    with pytest.raises(UserError, match=r"^layout\.precision: fp8 products are not in this device \(cpu\)"):
        use_fp8(transformer(), CPU)


def test_torchao_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install 'genscale\[torchao\]'"):
        use_fp8(transformer(), CPU)


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), (None, False)])
def test_fp8_products_begin_with_capability_8_9(monkeypatch, capability, has):
    module = types.SimpleNamespace(get_device_capability=lambda device: capability)
    monkeypatch.setattr(low_precision.torch, "get_device_module", lambda device: module)
    assert has_fp8_products(torch.device("meta")) == has
    assert not has_fp8_products(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_an_accelerator_trains_in_fp8():
    pytest.importorskip("torchao")
    device = torch.accelerator.current_accelerator()
    if not has_fp8_products(device):
        pytest.skip("this accelerator has no fp8 products")
    network = transformer().to(device)
    tokens = torch.randint(48, (4, 16), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        exact = network(tokens)
        assert use_fp8(network, device) == 2 * 7
        logits = network(tokens)
        logits.float().square().sum().backward()
    assert (logits - exact).float().norm() < 0.2 * exact.float().norm()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)

"""The choice of precision, autocast, and the scaler against torch's."""

import math

import pytest
import torch

from genscale.runtime.peak import Peak
from genscale.training import precision
from genscale.training.precision import GradientScaler, autocast, pick_precision

CPU = torch.device("cpu")


def set_peaks(monkeypatch, **peaks: float) -> None:
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    monkeypatch.setattr(precision, "matmul_peak", lambda device, dtype: Peak(peaks[dtypes[dtype]], "measured"))


@pytest.mark.parametrize(("bf16", "expected"), [(2.2, "bf16"), (1.5, "bf16"), (1.4, "fp32"), (0.1, "fp32")])
def test_a_cpu_uses_bf16_where_it_is_clearly_faster(monkeypatch, bf16, expected):
    set_peaks(monkeypatch, fp32=1.0, bf16=bf16)
    assert pick_precision("auto", CPU) == expected


@pytest.mark.parametrize(("bf16", "expected"), [(60.0, "bf16"), (65.0, "bf16"), (4.0, "fp16")])
def test_an_accelerator_uses_fp16_only_where_bf16_is_imitated(monkeypatch, bf16, expected):
    set_peaks(monkeypatch, fp16=65.0, bf16=bf16)
    assert pick_precision("auto", torch.device("meta")) == expected


@pytest.mark.parametrize("requested", ["fp32", "bf16", "fp16"])
def test_what_the_recipe_asks_for_is_used(requested):
    assert pick_precision(requested, CPU) == requested


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_run_in_the_precision(name, dtype):
    left, right = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    with autocast(name, CPU):
        product = left @ right
    assert product.dtype == dtype
    product.float().sum().backward()
    assert right.grad.dtype == torch.float32


def outcomes(count: int) -> list[bool]:
    """Whether each step overflows: a few at first, then none until the scale has grown twice."""
    return [step < 4 or step == 4700 for step in range(count)]


def test_the_scale_follows_torchs_scaler():
    ours, theirs = GradientScaler("fp16"), torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scales = set()
    for overflow in outcomes(6800):
        assert ours.scale(torch.ones(())) == theirs.scale(torch.ones(()))
        scales.add(ours.factor)
        parameter.grad = torch.full((1,), math.inf if overflow else 1.0)
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        assert ours.overflowed(1.0, math.inf if overflow else 1.0) == overflow
    assert sorted(scales) == [2.0**power for power in range(12, 17)]


def test_scaling_and_unscaling_gives_the_gradient_back_to_the_bit():
    weight = torch.randn(5, requires_grad=True)
    (plain,) = torch.autograd.grad((weight**3).sum(), weight)
    scaler = GradientScaler("fp16")
    (scaled,) = torch.autograd.grad(scaler.scale((weight**3).sum()), weight)
    assert scaled[0] == plain[0] * 2.0**16
    scaler.unscale([scaled])
    assert torch.equal(scaled, plain)


def test_faults_of_the_model_are_left_to_the_guard():
    scaler = GradientScaler("fp16")
    assert not scaler.overflowed(math.nan, math.nan)
    assert scaler.factor == 2.0**16
    skips = 0
    while scaler.overflowed(1.0, math.inf):
        skips += 1
    assert skips == 32  # from 2^16 to 2^-16: nothing ends in an endless search for a scale
    assert not scaler.overflowed(1.0, 1.0)


def test_a_loaded_scaler_goes_on_as_the_first():
    one, other = GradientScaler("fp16"), GradientScaler("fp16")
    series = [math.inf if overflow else 1.0 for overflow in outcomes(3000)]
    for norm in series[:1500]:
        one.overflowed(1.0, norm)
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    for norm in series[1500:]:
        assert one.overflowed(1.0, norm) == other.overflowed(1.0, norm)
        assert one.state() == other.state()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_other_precisions_are_not_scaled(name):
    scaler = GradientScaler(name)
    loss, gradient = torch.ones(()), torch.full((2,), 3.0)
    assert scaler.scale(loss) is loss
    scaler.unscale([gradient])
    assert torch.equal(gradient, torch.full((2,), 3.0))
    assert not scaler.overflowed(1.0, math.inf)
    assert scaler.state() == {}
    scaler.load({})

"""The average of the weights against its closed form, and what it leaves untouched."""

import pytest
import torch
from torch import nn

from genscale.runtime.errors import UserError
from genscale.training.average import WeightAverage


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)


def walk(net: nn.Module, average: WeightAverage, steps: range, batch: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        average.update(batch)


@pytest.mark.parametrize(("half_life", "batch"), [(200, 8), (10, 8), (10_000, 8)])
def test_the_average_is_the_sum_of_all_weights_by_how_much_of_each_is_left(half_life, batch):
    net, steps = network(), 60
    average = WeightAverage(net, half_life)
    history = [net[0].weight.detach().double().clone()]
    betas = []
    for step in range(steps):
        walk(net, average, range(step, step + 1), batch)
        history.append(net[0].weight.detach().double().clone())
        betas.append(0.5 ** (batch / min(half_life, 0.05 * (step + 1) * batch)))
    left = 1.0
    expected = torch.zeros_like(history[0])
    for beta, weight in zip(reversed(betas), reversed(history[1:]), strict=True):
        expected += left * (1 - beta) * weight
        left *= beta
    expected += left * history[0]
    torch.testing.assert_close(average.state["0.weight"].double(), expected, atol=1e-6, rtol=0)


def test_after_long_training_a_half_life_halves():
    net = network()
    average = WeightAverage(net, half_life=100)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    average.update(10_000_000)
    torch.testing.assert_close(average.state["0.weight"], torch.ones(4, 3))
    with torch.no_grad():
        net[0].weight.fill_(0.0)
    for _ in range(10):
        average.update(10)
    torch.testing.assert_close(average.state["0.weight"], torch.full((4, 3), 0.5))


def test_early_on_the_initial_weights_are_forgotten():
    net = network()
    average = WeightAverage(net, half_life=1_000_000)
    with torch.no_grad():
        net[0].weight.fill_(5.0)
    for _ in range(20):
        average.update(8)
    torch.testing.assert_close(average.state["0.weight"], torch.full((4, 3), 5.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_shows_the_average_and_gives_the_weights_back_to_the_bit(dtype):
    net = network(dtype)
    average = WeightAverage(net, half_life=100)
    walk(net, average, range(5), 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with average.swapped():
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, average.state[name].to(dtype))
            assert not torch.equal(parameter, before[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(tensor.dtype == torch.float32 for name, tensor in average.state.items() if name != "samples")


def test_an_error_amid_a_look_at_the_average_gives_the_weights_back():
    net = network()
    average = WeightAverage(net, half_life=100)
    walk(net, average, range(5), 8)
    before = net[0].weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.swapped():
        1 / 0  # noqa: B018
    assert torch.equal(net[0].weight, before)


def test_a_loaded_average_goes_on_to_the_bit():
    straight, first, second = network(), network(), network()
    whole, part, resumed = (WeightAverage(net, half_life=50) for net in (straight, first, second))
    walk(straight, whole, range(20), 8)
    walk(first, part, range(10), 8)
    resumed.load({name: tensor.clone() for name, tensor in part.state.items()})
    walk(second, resumed, range(10, 20), 8)
    assert resumed.samples == whole.samples == 160
    assert all(torch.equal(tensor, whole.state[name]) for name, tensor in resumed.state.items())


def test_the_average_of_another_network_is_refused():
    average = WeightAverage(network(), half_life=50)
    with pytest.raises(UserError, match=r"no average of '0\.weight' of shape \(4, 3\)"):
        average.load({**average.state, "0.weight": torch.zeros(4, 4)})

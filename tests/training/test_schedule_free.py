"""Schedule-free AdamW against its authors' package and against the paper's three sequences in float64."""

import pytest
import torch

from genscale.training.schedule_free import ScheduleFreeAdamW

BETAS = (0.9, 0.95)


def random_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(8, 6), (5,)]]


def trained(steps: int, decay: float = 0.1) -> tuple[ScheduleFreeAdamW, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(tensor) for tensor in random_tensors(0)]
    optimizer = ScheduleFreeAdamW([{"params": parameters, "lr": 0.0, "weight_decay": decay}], BETAS, 1e-8)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        for parameter, gradient in zip(parameters, random_tensors(100 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return optimizer, parameters


def learning_rate(step: int) -> float:
    return 0.01 * min(1.0, (step + 1) / 10)


def test_fifty_steps_equal_those_of_the_authors_package():
    schedulefree = pytest.importorskip("schedulefree", reason="the reference: pip install schedulefree")
    optimizer, parameters = trained(50)
    theirs = [torch.nn.Parameter(tensor) for tensor in random_tensors(0)]
    reference = schedulefree.AdamWScheduleFree(theirs, lr=0.01, betas=BETAS, weight_decay=0.1, warmup_steps=10)
    reference.train()
    for step in range(50):
        for parameter, gradient in zip(theirs, random_tensors(100 + step), strict=True):
            parameter.grad = gradient
        reference.step()
    for one, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    reference.eval()
    with optimizer.averaged():
        for one, other in zip(parameters, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_fifty_steps_equal_the_papers_sequences():
    optimizer, parameters = trained(50)
    x = [tensor.double() for tensor in random_tensors(0)]
    z = [tensor.clone() for tensor in x]
    squares = [torch.zeros_like(tensor) for tensor in x]
    weights = 0.0
    for step in range(50):
        rate = learning_rate(step)
        weights += rate**2
        for index, gradient in enumerate(random_tensors(100 + step)):
            gradient = gradient.double()
            y = 0.1 * z[index] + 0.9 * x[index]
            squares[index] = 0.95 * squares[index] + 0.05 * gradient**2
            direction = gradient / ((squares[index] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8) + 0.1 * y
            z[index] = z[index] - rate * direction
            share = rate**2 / weights
            x[index] = (1 - share) * x[index] + share * z[index]
    with optimizer.averaged():
        for parameter, average in zip(parameters, x, strict=True):
            torch.testing.assert_close(parameter.double(), average, atol=2e-6, rtol=0)


def test_looking_at_the_average_leaves_training_as_it_was():
    optimizer, parameters = trained(7)
    before = [parameter.detach().clone() for parameter in parameters]
    with optimizer.averaged():
        assert not torch.equal(parameters[0], before[0])
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))


def test_before_the_first_step_the_average_is_the_weights():
    optimizer, parameters = trained(0)
    before = [parameter.detach().clone() for parameter in parameters]
    with optimizer.averaged():
        assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))


def test_a_learning_rate_of_zero_moves_nothing():
    optimizer, parameters = trained(0, decay=0.0)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))

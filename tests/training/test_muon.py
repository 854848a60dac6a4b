"""Muon against torch's own, against the singular value decomposition, and against itself piece by piece."""

import math

import pytest
import torch

from genscale.training.muon import Form, Muon, orthogonalise

SHAPES = [(16, 16), (16, 48), (48, 16), (16, 16), (64, 24)]


def random_matrices(shapes: list[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def newton_schulz_float64(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Jordan's iteration on the singular values themselves: s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-5), (16, 0.03)])
def test_newton_schulz_acts_on_the_singular_values_as_the_quintic_says(bits, tolerance):
    matrices = random_matrices(SHAPES, seed=0)
    for matrix, result in zip(matrices, orthogonalise(matrices, steps=5, bits=bits), strict=True):
        assert result.shape == matrix.shape
        torch.testing.assert_close(result.double(), newton_schulz_float64(matrix, 5), atol=tolerance, rtol=0)


def test_singular_values_come_close_to_one():
    for result in orthogonalise(random_matrices(SHAPES, seed=1), steps=5, bits=32):
        values = torch.linalg.svdvals(result)
        assert 0.3 < values.min() <= values.max() < 1.3


def test_a_matrix_is_treated_the_same_alone_and_in_company(monkeypatch):
    matrices = random_matrices(SHAPES, seed=2)
    together = orthogonalise(matrices, steps=5, bits=32)
    alone = [orthogonalise([matrix], steps=5, bits=32)[0] for matrix in matrices]
    monkeypatch.setattr("genscale.training.muon._STACKED_ELEMENTS", 16 * 48)  # one matrix at a time
    in_parts = orthogonalise(matrices, steps=5, bits=32)
    for results in (alone, in_parts):
        for one, other in zip(together, results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_zero_gradient_gives_a_zero_update():
    (result,) = orthogonalise([torch.zeros(4, 8)], steps=5, bits=16)
    assert torch.equal(result, torch.zeros(4, 8, dtype=torch.bfloat16))


def test_fifty_steps_equal_those_of_torch():
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in random_matrices(SHAPES, seed=3)]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in random_matrices(SHAPES, seed=3)]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon([{"params": ours, **settings}], momentum=0.95, newton_schulz_steps=5, bits=16)
    reference = torch.optim.Muon(theirs, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="original", **settings)
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(50):
        learning_rate = 0.02 * (1 - step / 60)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = learning_rate
        for one, other, gradient in zip(ours, theirs, random_matrices(SHAPES, seed=100 + step), strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.01 * moved  # bfloat16 has 8 bits; the updates of 50 steps add up


def test_fifty_steps_in_float32_equal_the_formulas_in_float64():
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in random_matrices(SHAPES, seed=4)]
    reference = [matrix.double() for matrix in random_matrices(SHAPES, seed=4)]
    momenta = [torch.zeros_like(matrix) for matrix in reference]
    optimizer = Muon([{"params": ours, "lr": 0.02, "weight_decay": 0.05}], momentum=0.9, newton_schulz_steps=5, bits=32)
    for step in range(50):
        gradients = random_matrices(SHAPES, seed=200 + step)
        for index, gradient in enumerate(gradients):
            ours[index].grad = gradient
            momenta[index] = 0.9 * momenta[index] + 0.1 * gradient.double()
            direction = newton_schulz_float64(0.1 * gradient.double() + 0.9 * momenta[index], 5)
            rows, columns = gradient.shape
            scale = math.sqrt(max(1, rows / columns))
            reference[index] = reference[index] * (1 - 0.02 * 0.05) - 0.02 * scale * direction
        optimizer.step()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=0)


def test_stacked_matrices_are_orthogonalised_one_by_one():
    stacked, gradients = random_matrices([(40, 16)], 5)[0], random_matrices([(16, 16), (16, 16), (8, 16)], 6)
    whole = torch.nn.Parameter(stacked.clone())
    apart = [torch.nn.Parameter(piece.clone()) for piece in stacked.split([16, 16, 8])]
    settings = {"momentum": 0.95, "newton_schulz_steps": 5, "bits": 32}
    together = Muon([{"params": [whole], "lr": 0.1, "weight_decay": 0.0}], forms={whole: Form((16, 16, 8))}, **settings)
    separate = Muon([{"params": apart, "lr": 0.1, "weight_decay": 0.0}], **settings)
    whole.grad = torch.cat(gradients)
    for parameter, gradient in zip(apart, gradients, strict=True):
        parameter.grad = gradient
    together.step()
    separate.step()
    torch.testing.assert_close(whole.detach(), torch.cat([parameter.detach() for parameter in apart]))


def test_a_convolution_is_a_matrix_of_its_output_channels():
    kernel = torch.nn.Parameter(random_matrices([(8, 4, 3, 3)], 7)[0])
    matrix = torch.nn.Parameter(kernel.detach().clone().view(8, 36))
    kernel.grad = random_matrices([(8, 4, 3, 3)], 8)[0]
    matrix.grad = kernel.grad.clone().view(8, 36)
    for parameter in (kernel, matrix):
        Muon([{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}], 0.95, 5, bits=32).step()
    assert torch.equal(kernel.detach().view(8, 36), matrix.detach())

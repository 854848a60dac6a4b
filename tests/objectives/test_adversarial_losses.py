"""The adversarial losses by hand, and the penalties against closed forms and finite differences."""

import math

import pytest
import torch
from torch import nn

from genscale.objectives.adversarial_losses import (
    discriminator_loss,
    generator_loss,
    path_lengths,
    squared_gradient,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softplus(x):
    return math.log1p(math.exp(x))


def test_each_loss_is_what_its_paper_says():
    real, fake = torch.tensor([2.0, -0.5], dtype=torch.float64), torch.tensor([0.25, 3.0], dtype=torch.float64)
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    discriminator = {
        "relativistic": [-math.log(1 / (1 + math.exp(-(r - f)))) for r, f in pairs],
        "non_saturating": [-math.log(1 / (1 + math.exp(-r))) - math.log(1 - 1 / (1 + math.exp(-f))) for r, f in pairs],
        "hinge": [max(0, 1 - r) + max(0, 1 + f) for r, f in pairs],
        "wasserstein": [f - r for r, f in pairs],
    }
    generator = {
        "relativistic": [-math.log(1 / (1 + math.exp(-(f - r)))) for r, f in pairs],
        "non_saturating": [-math.log(1 / (1 + math.exp(-f))) for _, f in pairs],
        "hinge": [-f for _, f in pairs],
        "wasserstein": [-f for _, f in pairs],
    }
    for kind in discriminator:
        assert discriminator_loss(kind, real, fake).tolist() == pytest.approx(discriminator[kind], rel=1e-14)
        assert generator_loss(kind, real, fake).tolist() == pytest.approx(generator[kind], rel=1e-14)


def test_the_relativistic_game_is_symmetric_and_sees_differences_only():
    real, fake = draw(5), draw(5, seed=1)
    swapped = discriminator_loss("relativistic", fake, real)
    torch.testing.assert_close(generator_loss("relativistic", real, fake), swapped)
    shifted = discriminator_loss("relativistic", real + 7, fake + 7)
    torch.testing.assert_close(shifted, discriminator_loss("relativistic", real, fake))


@pytest.mark.parametrize("size", [10.0, 100.0, 1000.0])
def test_losses_of_large_logits_are_finite(size):
    real, fake = torch.tensor([-size]), torch.tensor([size])
    for kind in ("relativistic", "non_saturating", "hinge", "wasserstein"):
        assert discriminator_loss(kind, real, fake).isfinite().all()
        assert generator_loss(kind, fake, real).isfinite().all()


def test_the_squared_gradient_of_a_quadratic():
    """For D(x) = x' A x / 2 + b' x with a symmetric A the gradient is A x + b."""
    matrix, vector, images = draw(8, 8), draw(8, seed=1), draw(3, 2, 2, 2, seed=2)
    matrix = (matrix + matrix.T).requires_grad_()
    images.requires_grad_()
    x = images.flatten(1)
    penalty = squared_gradient((x @ matrix * x).sum(1) / 2 + x @ vector, images)
    gradient = x @ matrix + vector
    torch.testing.assert_close(penalty, gradient.square().sum(1))
    # and its own gradient, summed over images: 2 A (A x + b) with respect to x
    (second,) = torch.autograd.grad(penalty.sum(), images)
    torch.testing.assert_close(second.flatten(1), 2 * gradient @ matrix)


def test_path_lengths_of_a_linear_generator_are_those_of_its_transpose():
    """For G(z) = W z the Jacobian is W wherever z is, so that the length is |W' y| / sqrt(pixels)."""
    weight, latents, noise = draw(2 * 3 * 3, 5).requires_grad_(), draw(4, 5, seed=1), draw(4, 2, 3, 3, seed=2)
    latents.requires_grad_()
    images = (latents @ weight.T).view(4, 2, 3, 3)
    lengths = path_lengths(images, latents, noise)
    torch.testing.assert_close(lengths, (noise.flatten(1) @ weight).norm(dim=1) / 3)
    (found,) = torch.autograd.grad(lengths.sum(), weight)
    y = noise.flatten(1)
    expected = sum(torch.outer(y[i], y[i] @ weight.detach()) / (y[i] @ weight.detach()).norm() for i in range(4)) / 3
    torch.testing.assert_close(found, expected)


def test_path_lengths_of_a_curved_generator_have_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    latents, noise = draw(5, 3, seed=1), draw(5, 1, 2, 2, seed=2)

    def total():
        z = latents.clone().requires_grad_()
        return path_lengths(network(z).view(5, 1, 2, 2), z, noise).square().sum()

    weight = network[0].weight
    (exact,) = torch.autograd.grad(total(), weight)
    direction, values = draw(8, 3, seed=3), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(total().item())
        with torch.no_grad():
            weight.sub_(step * direction)
    assert (exact * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-7)

"""The generator and the discriminator: shapes, first weights, conditioning, and gradients of gradients."""

import pytest
import torch

from genscale.data.description import ImageDescription
from genscale.models.gan import Discriminator, Generator, ResidualBlock
from genscale.models.initialise import initialise
from genscale.recipe.image_model import GANModel
from genscale.runtime.errors import UserError

SMALL = GANModel(latent=6, generator=(8, 4), discriminator=(4, 8), group_width=4, embedding=5)


def described(resolution=8, channels=1, classes=3):
    return ImageDescription(channels, resolution, tuple(f"class {i}" for i in range(classes)))


def pair(shape=SMALL, conditional=True, **what):
    networks = Generator(shape, described(**what), conditional), Discriminator(shape, described(**what), conditional)
    for name, network in zip(("generator", "discriminator"), networks, strict=True):
        initialise(network, 0, prefix=name)
    return networks


@pytest.mark.parametrize(("resolution", "levels"), [(8, 3), (8, 1), (28, 3), (32, 4), (12, 2), (6, 1)])
@pytest.mark.parametrize("conditional", [False, True])
def test_any_resolution_that_can_be_halved_works(resolution, levels, conditional):
    shape = SMALL.model_copy(update={"generator": (8,) * levels, "discriminator": (8,) * levels, "blocks": 2})
    generator, discriminator = pair(shape, conditional, resolution=resolution, channels=3)
    labels = torch.tensor([0, 3]) if conditional else None
    images = generator(torch.randn(2, 6), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)


@pytest.mark.parametrize(("resolution", "levels", "most"), [(28, 4, 3), (8, 4, 3), (7, 2, 1), (4, 3, 2)])
def test_a_resolution_that_cannot_is_one_clear_line(resolution, levels, most):
    for key, network in (("generator", Generator), ("discriminator", Discriminator)):
        shape = SMALL.model_copy(update={key: (8,) * levels})
        with pytest.raises(UserError, match=rf"{key}: {levels} levels .* {resolution} pixels .* most {most} levels"):
            network(shape, described(resolution), False)


def test_groups_that_do_not_divide_are_found_in_the_recipe():
    with pytest.raises(ValueError, match=r"group_width \(16\) must divide 20 channels of generator x expansion \(2\)"):
        GANModel(generator=(20, 16))
    GANModel(generator=(20, 16), group_width=None)


def test_first_weights_keep_the_variance_whatever_the_depth():
    for blocks in (1, 4):
        shape = GANModel(latent=64, generator=(64, 64, 32), discriminator=(32, 64, 64), blocks=blocks)
        generator, discriminator = pair(shape, channels=3, classes=10)
        labels = torch.arange(64) % 10
        with torch.no_grad():
            images = generator(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), labels)
            noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            logits = discriminator(noise, labels)
        # Resampling averages neighbours, and so takes from the variance, most of all where pixels are independent.
        assert 0.2 < images.std() < 1.5
        assert 0.02 < logits.std() < 1.5


def test_a_block_is_first_the_identity_and_its_branch_keeps_the_variance():
    torch.manual_seed(0)
    block = ResidualBlock(64, 2, 16)
    generator, _ = pair(GANModel(generator=(64,), discriminator=(64,)), resolution=8)
    first = generator.blocks[0][0]
    x = torch.randn(64, 64, 8, 8)
    assert torch.equal(first(x), x)
    block.load_state_dict(first.state_dict())
    middle = torch.nn.functional.leaky_relu(block.widen(x), 0.2)
    assert middle.square().mean().item() == pytest.approx(1, rel=0.1)


def test_first_weights_are_functions_of_seed_and_name():
    one, other = pair()[0].state_dict(), pair()[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    wider = pair(classes=5)[0].state_dict()
    assert torch.equal(one["output.weight"], wider["output.weight"])


def test_classes_change_what_is_drawn_and_judged():
    generator, discriminator = pair()
    latents = torch.randn(1, 6).expand(2, -1)
    images = generator(latents, torch.tensor([0, 1]))
    assert not torch.allclose(images[0], images[1])
    one, other = discriminator(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert one.item() != other.item()


def test_the_discriminator_projects_on_the_vector_of_the_class():
    """Its logit is linear in the class's vector (Miyato and Koyama 2018)."""
    _, discriminator = pair()
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        discriminator.embedding.weight[2] = 2 * discriminator.embedding.weight[0] - discriminator.embedding.weight[1]
        zero, one, two = discriminator(x.expand(3, -1, -1, -1), torch.arange(3))
    assert two.item() == pytest.approx(2 * zero.item() - one.item(), rel=1e-4, abs=1e-5)


def test_an_image_is_drawn_and_judged_by_itself():
    """Nothing of the batch enters: no batch norm, no minibatch statistic."""
    generator, discriminator = pair()
    generator, discriminator = generator.double(), discriminator.double()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    latents, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    images = generator(latents, labels)
    torch.testing.assert_close(generator(latents[2:3], labels[2:3]), images[2:3])
    torch.testing.assert_close(discriminator(images, labels)[2:3], discriminator(images[2:3], labels[2:3]))


def test_the_squared_gradient_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    _, discriminator = pair()
    discriminator = discriminator.double()
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])

    def penalty():
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x, labels).sum(), x, create_graph=True)
        return gradient.square().sum()

    names = ["input.weight", "blocks.0.0.look.weight", "transitions.0.weight", "basis", "embedding.weight"]
    parameters = dict(discriminator.named_parameters())
    exact = torch.autograd.grad(penalty(), [parameters[name] for name in names])
    for name, gradient in zip(names, exact, strict=True):
        direction = torch.randn_like(gradient)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameters[name].add_(step * direction)
            values.append(penalty().item())
            with torch.no_grad():
                parameters[name].add_(-step * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5), name

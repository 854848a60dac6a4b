"""Generators and discriminators: resolutions, classes, range, gradients of gradients, and how each kind begins."""

import pytest
import torch
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.gan import ResidualBlock
from genscale.models.initialise import initialise
from genscale.models.players import build_player
from genscale.recipe.image_model import DCGANModel, GANModel
from genscale.runtime.errors import UserError

RESIDUAL = GANModel(latent=6, generator=(8, 4), discriminator=(4, 8), group_width=4, embedding=5)
STRIDED = DCGANModel(latent=6, generator=(8, 4), discriminator=(4, 8), embedding=5)
BOTH = pytest.mark.parametrize("shape", [RESIDUAL, STRIDED], ids=lambda shape: shape.kind)


def described(resolution=8, channels=1, classes=3, autoencoder=None):
    names = tuple(f"class {i}" for i in range(classes))
    return ImageDescription(channels, resolution, names, autoencoder=autoencoder)


def pair(shape, conditional=True, lively=False, **what):
    """In float64; ``lively``: every layer is heard, as after some training."""
    players = []
    for role in ("generator", "discriminator"):
        player = build_player(role, shape, described(**what), conditional)
        initialise(player, 0, prefix=role)
        players.append(player.double())
    if lively:
        torch.manual_seed(0)
        for player in players:
            for parameter in player.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
    return players


def latents(count):
    return torch.randn(count, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "resolution", "levels"),
    [(RESIDUAL, *case) for case in ((8, 3), (8, 1), (28, 3), (32, 4), (12, 2), (6, 1), (7, 1))]
    + [(STRIDED, *case) for case in ((8, 2), (8, 1), (28, 2), (32, 4), (12, 1), (4, 1))],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_any_resolution_that_can_be_halved_works(shape, resolution, levels, conditional):
    shape = shape.model_copy(update={"generator": (8,) * levels, "discriminator": (8,) * levels})
    generator, discriminator = pair(shape, conditional, resolution=resolution, channels=3)
    labels = torch.tensor([0, 3]) if conditional else None
    images = generator(latents(2), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)


@pytest.mark.parametrize(
    ("shape", "resolution", "levels", "most"),
    [(RESIDUAL, *case) for case in ((28, 4, 3), (8, 4, 3), (7, 2, 1), (4, 3, 2))]
    + [(STRIDED, *case) for case in ((28, 3, 2), (8, 3, 2), (6, 2, 1), (12, 3, 2), (7, 1, None), (7, 2, None))],
)
def test_a_resolution_that_cannot_is_one_clear_line_and_its_advice_works(shape, resolution, levels, most):
    for role in ("generator", "discriminator"):
        advice = rf"give at most {most} levels, or another" if most else "give another"
        line = rf"model.{role}: {levels} levels .* {resolution} pixels do not allow; {advice} data.resolution"
        with pytest.raises(UserError, match=line):
            build_player(role, shape.model_copy(update={role: (8,) * levels}), described(resolution), False)
        if most:
            build_player(role, shape.model_copy(update={role: (8,) * most}), described(resolution), False)


@BOTH
def test_first_weights_are_functions_of_seed_and_name(shape):
    one, other, wider = (pair(shape, classes=classes)[0].state_dict() for classes in (3, 3, 5))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["mix.weight"], wider["mix.weight"])


@BOTH
def test_pixels_are_bounded_and_latents_of_an_autoencoder_are_not(shape):
    pixels, cells = (pair(shape, lively=True, autoencoder=given)[0] for given in (None, "vae"))
    drawn_from, labels = 10 * latents(64), torch.zeros(64, dtype=torch.long)
    assert cells(drawn_from, labels).abs().max() > 1.5
    torch.testing.assert_close(pixels(drawn_from, labels), cells(drawn_from, labels).tanh())


@BOTH
def test_classes_change_what_is_drawn_and_judged(shape):
    generator, discriminator = pair(shape, lively=True)
    images = generator(latents(1).expand(4, -1), torch.arange(4))
    assert min((images[i] - images[j]).abs().max() for i in range(4) for j in range(i)) > 1e-3
    logits = discriminator(images[:1].expand(4, -1, -1, -1), torch.arange(4))
    assert logits.diff().abs().min() > 1e-3


@BOTH
def test_the_discriminator_projects_on_the_vector_of_the_class(shape):
    """Its logit is linear in the class's vector (Miyato and Koyama 2018)."""
    _, discriminator = pair(shape, lively=True)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        discriminator.embedding.weight[2] = 2 * discriminator.embedding.weight[0] - discriminator.embedding.weight[1]
        zero, one, two = discriminator(x.expand(3, -1, -1, -1), torch.arange(3))
    assert two.item() == pytest.approx(2 * zero.item() - one.item(), rel=1e-9)


@BOTH
def test_an_image_is_drawn_and_judged_by_itself(shape):
    """Nothing of the batch enters: no batch norm, no minibatch statistic."""
    generator, discriminator = pair(shape, lively=True)
    drawn_from, labels = latents(4), torch.tensor([0, 1, 2, 3])
    images = generator(drawn_from, labels)
    torch.testing.assert_close(generator(drawn_from[2:3], labels[2:3]), images[2:3])
    torch.testing.assert_close(discriminator(images, labels)[2:3], discriminator(images[2:3], labels[2:3]))


@BOTH
def test_the_squared_gradient_has_the_gradient_of_finite_differences(shape):
    _, discriminator = pair(shape, lively=True)
    images, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])

    def penalty():
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x, labels).sum(), x, create_graph=True)
        return gradient.square().sum()

    parameters = {name: each for name, each in discriminator.named_parameters() if not name.endswith("bias")}
    exact = torch.autograd.grad(penalty(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), exact, strict=True):
        direction = torch.randn_like(gradient)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
            values.append(penalty().item())
            with torch.no_grad():
                parameter.add_(-step * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5), name


# Residual blocks


def test_groups_that_do_not_divide_are_found_in_the_recipe():
    with pytest.raises(ValueError, match=r"group_width \(16\) must divide 20 channels of generator x expansion \(2\)"):
        GANModel(generator=(20, 16))
    GANModel(generator=(20, 16), group_width=None)


def test_first_weights_keep_the_variance_whatever_the_depth():
    torch.manual_seed(0)
    for blocks in (1, 4):
        shape = GANModel(latent=64, generator=(64, 64, 32), discriminator=(32, 64, 64), blocks=blocks)
        generator, discriminator = pair(shape, channels=3, classes=10, autoencoder="vae")  # so that nothing is bounded
        labels = torch.arange(64) % 10
        with torch.no_grad():
            drawn = generator(torch.randn(64, 64, dtype=torch.float64), labels)
            logits = discriminator(torch.randn(64, 3, 8, 8, dtype=torch.float64), labels)
        # Resampling averages neighbours, and so takes from the variance, most of all where pixels are independent.
        assert 0.2 < drawn.std() < 1.5
        assert 0.02 < logits.std() < 1.5


def test_a_block_is_first_the_identity_and_its_branch_keeps_the_variance():
    torch.manual_seed(0)
    block = ResidualBlock(64, 2, 16).double()
    generator, _ = pair(GANModel(generator=(64,), discriminator=(64,)))
    first = generator.blocks[0][0]
    x = torch.randn(64, 64, 8, 8, dtype=torch.float64)
    assert torch.equal(first(x), x)
    block.load_state_dict(first.state_dict())
    middle = F.leaky_relu(block.widen(x), 0.2)
    assert middle.square().mean().item() == pytest.approx(1, rel=0.1)


# Strided convolutions


def test_levels_without_channels_are_found_in_the_recipe():
    with pytest.raises(ValueError, match="greater than 0"):
        DCGANModel(generator=(8, 0))


def test_first_weights_take_the_same_from_the_variance_in_every_layer():
    torch.manual_seed(0)
    shape = DCGANModel(latent=64, generator=(256, 128, 64), discriminator=(64, 128, 256))
    generator, discriminator = pair(shape, channels=3, classes=10, resolution=32)
    labels = torch.arange(64) % 10
    measured = {}
    for player in (generator, discriminator):
        for module in (player.mix, *player.levels):
            module.register_forward_hook(lambda module, _, output: measured.update({module: output.std().item()}))
    with torch.no_grad():
        generator(torch.randn(64, 64, dtype=torch.float64), labels)
        discriminator(torch.randn(64, 3, 32, 32, dtype=torch.float64), labels)
    drawn = [measured[module] for module in (generator.mix, *generator.levels)]
    judged = [measured[module] for module in (*discriminator.levels, discriminator.mix)]
    # Each layer's output is 0.4 times as spread as its input, which the generator's norms undo; at the border of n x n
    # outputs a kernel sees padding.
    padded = {n: 1 - 1 / (2 * n) for n in (4, 8, 16)}
    assert drawn == pytest.approx([0.4, 0.4 * padded[4], 0.4 * padded[8], 0.4 * padded[16]], rel=0.1)
    # A weight makes up for the activation before it by 1.39; the first has none before it, and the last does not.
    first = 1.39 * 0.4 * padded[16]
    second, third = first * 0.4 * padded[8], first * 0.4**2 * padded[8] * padded[4]
    assert judged == pytest.approx([first, second, third, third * 0.4 / 1.39], rel=0.1)


def test_the_generator_is_that_of_the_paper_with_each_image_normalised_by_itself():
    generator, _ = pair(STRIDED, conditional=False)
    weights, drawn_from = generator.state_dict(), latents(3)
    x = (drawn_from @ weights["mix.weight"].T + weights["mix.bias"]).view(3, 8, 2, 2)
    for level in range(2):
        mean, variance = x.mean(dim=(1, 2, 3), keepdim=True), x.var(dim=(1, 2, 3), correction=0, keepdim=True)
        x = ((x - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
        weight, bias = weights[f"levels.{level}.weight"], weights[f"levels.{level}.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(generator(drawn_from), x.tanh())

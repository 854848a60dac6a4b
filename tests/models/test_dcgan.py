"""The pair of strided convolutions: shapes, first weights, conditioning, and what one image is to another."""

import pytest
import torch
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.initialise import initialise
from genscale.models.players import build_discriminator, build_generator
from genscale.recipe.image_model import DCGANModel, GANModel
from genscale.runtime.errors import UserError

SMALL = DCGANModel(latent=6, generator=(8, 4), discriminator=(4, 8), embedding=5)


def described(resolution=8, channels=1, classes=3, autoencoder=None):
    names = tuple(f"class {i}" for i in range(classes))
    return ImageDescription(channels, resolution, names, autoencoder=autoencoder)


def pair(shape=SMALL, conditional=True, **what):
    networks = (
        build_generator(shape, described(**what), conditional),
        build_discriminator(shape, described(**what), conditional),
    )
    for name, network in zip(("generator", "discriminator"), networks, strict=True):
        initialise(network, 0, prefix=name)
    return networks


@pytest.mark.parametrize(("resolution", "levels"), [(8, 2), (8, 1), (28, 1), (32, 4), (12, 1), (4, 1)])
@pytest.mark.parametrize("conditional", [False, True])
def test_any_resolution_that_can_be_halved_works(resolution, levels, conditional):
    shape = SMALL.model_copy(update={"generator": (8,) * levels, "discriminator": (8,) * levels})
    generator, discriminator = pair(shape, conditional, resolution=resolution, channels=3)
    labels = torch.tensor([0, 3]) if conditional else None
    images = generator(torch.randn(2, 6), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)


@pytest.mark.parametrize(("resolution", "levels", "most"), [(28, 3, 2), (8, 3, 2), (6, 2, 1), (12, 3, 2), (7, 1, 1)])
def test_a_resolution_that_cannot_is_one_clear_line(resolution, levels, most):
    for key, build in (("generator", build_generator), ("discriminator", build_discriminator)):
        shape = SMALL.model_copy(update={key: (8,) * levels})
        line = rf"model.{key}: {levels} levels halve .* {levels} times, which {resolution} pixels .* most {most} levels"
        with pytest.raises(UserError, match=line):
            build(shape, described(resolution), False)


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
        generator(torch.randn(64, 64), labels)
        discriminator(torch.randn(64, 3, 32, 32), labels)
    # Each layer's output is 0.4 times as spread as its input, which the generator's norms undo. A weight that makes up
    # for an activation before it is 1.39 times as large; the first one has none before it, the last does not make up.
    drawn = [measured[module] for module in (generator.mix, *generator.levels)]
    judged = [measured[module] for module in (*discriminator.levels, discriminator.mix)]
    assert drawn == pytest.approx([0.4] * 4, rel=0.2)
    assert judged == pytest.approx([1.39 * 0.4, 1.39 * 0.4**2, 1.39 * 0.4**3, 0.4**4], rel=0.2)


def test_pixels_are_bounded_and_latents_of_an_autoencoder_are_not():
    for shape in (SMALL, GANModel(latent=6, generator=(8, 4), discriminator=(4, 8), group_width=4, embedding=5)):
        latents, labels = 100 * torch.randn(64, 6), torch.zeros(64, dtype=torch.long)
        pixels, cells = (pair(shape, autoencoder=given)[0] for given in (None, "vae"))
        with torch.no_grad():
            for network in (pixels, cells):
                last = network.levels[-1] if shape is SMALL else network.output
                last.weight *= 10
            assert pixels(latents, labels).abs().max() <= 1
            assert cells(latents, labels).abs().max() > 3
            torch.testing.assert_close(pixels(latents, labels), cells(latents, labels).tanh())


def test_the_generator_is_that_of_the_paper_with_each_image_normalised_by_itself():
    generator, _ = pair(conditional=False)
    weights, latents = generator.state_dict(), torch.randn(3, 6)
    x = (latents @ weights["mix.weight"].T + weights["mix.bias"]).view(3, 8, 2, 2)
    for level in range(2):
        mean, variance = x.mean(dim=(1, 2, 3), keepdim=True), x.var(dim=(1, 2, 3), correction=0, keepdim=True)
        x = ((x - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
        weight, bias = weights[f"levels.{level}.weight"], weights[f"levels.{level}.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    torch.testing.assert_close(generator(latents), x.tanh())


def test_classes_change_what_is_drawn_and_judged():
    generator, discriminator = pair()
    latents = torch.randn(1, 6).expand(4, -1)
    images = generator(latents, torch.arange(4))
    assert len({tuple(image.flatten().tolist()) for image in images}) == 4
    logits = discriminator(images[:1].expand(4, -1, -1, -1), torch.arange(4))
    assert len(set(logits.tolist())) == 4


def test_an_image_is_drawn_and_judged_by_itself():
    generator, discriminator = pair()
    latents, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    images = generator(latents, labels)
    torch.testing.assert_close(generator(latents[3:4], labels[3:4]), images[3:4])
    torch.testing.assert_close(discriminator(images[3:4], labels[3:4]), discriminator(images, labels)[3:4])


def test_the_squared_gradient_has_the_gradient_of_finite_differences():
    _, discriminator = pair()
    discriminator.double()
    images, labels = torch.randn(2, 1, 8, 8, dtype=torch.double), torch.tensor([0, 1])

    def penalty():
        seen = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(seen, labels).sum(), seen, create_graph=True)
        return gradient.square().sum()

    weight = discriminator.levels[1].weight
    (exact,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
        values.append(penalty().item())
        with torch.no_grad():
            weight -= sign * 1e-6 * direction
    assert (values[0] - values[1]) / 2e-6 == pytest.approx((exact * direction).sum().item(), rel=1e-4)

"""What a denoising network is told, and what stands for nothing."""

import math

import pytest
import torch

from genscale.data.description import ImageDescription
from genscale.models.conditioning import CaptionEncoder, Condition, fourier_features
from genscale.models.initialise import initialise
from genscale.recipe.image_model import TextEncoder

DESCRIBED = ImageDescription(1, 8, ("a", "b", "c"), caption_vocabulary=300, caption_tokens=6)
LEVELS = torch.tensor([0.1, 0.5, -1.3])


def condition(kind, augmentation_width=0, seed=0):
    network = Condition(DESCRIBED, kind, 32, 24, TextEncoder(layers=2, width=16, heads=2), augmentation_width)
    initialise(network, seed)
    return network


def test_features_are_those_of_a_step_of_a_thousand():
    # Ho et al. 2020: cos and sin of step x 10000^(-i / half), in float64.
    steps = torch.tensor([0, 1, 17, 999])
    found = fourier_features(steps.double() / 1000, 64)
    for row, step in zip(found, steps.tolist(), strict=True):
        angles = [step * 10_000 ** (-i / 32) for i in range(32)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_neighbouring_levels_differ_and_bfloat16_does_not_confuse_them():
    network = condition("none")
    levels = torch.tensor([0.500, 0.501, 0.502])
    apart = (network(levels).vector[1:] - network(levels).vector[:-1]).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        roughly = network(levels).vector.float()
    assert (roughly - network(levels).vector).norm(dim=1).max() < apart.min() / 4
    half = condition("none").to(torch.bfloat16)(levels).vector
    assert half.dtype == torch.bfloat16
    assert (half.float() - network(levels).vector).norm(dim=1).max() < apart.min() / 4


def test_the_label_after_the_last_means_none():
    network = condition("class")
    nothing = network(LEVELS).vector
    torch.testing.assert_close(network(LEVELS, torch.tensor([3, 3, 3])).vector, nothing)
    told = network(LEVELS, torch.tensor([0, 3, 2])).vector
    assert torch.equal(told[1], nothing[1])
    assert (told - nothing)[[0, 2]].norm(dim=1).min() > 0.5


def test_what_the_network_is_not_told_changes_nothing():
    network = condition("none")
    captions = torch.ones(3, 6, dtype=torch.long)
    told = network(LEVELS, torch.tensor([0, 1, 2]), captions, torch.ones(3, 4))
    assert told.words is None
    assert torch.equal(told.vector, network(LEVELS).vector)


def test_a_caption_of_zeros_is_no_caption():
    network = condition("text")
    nothing = network(LEVELS).vector
    captions = torch.tensor([[5, 9, 2, 0, 0, 0], [0] * 6, [7, 7, 0, 0, 0, 0]])
    told = network(LEVELS, captions=captions).vector
    assert torch.equal(told[1], nothing[1])
    assert (told - nothing)[[0, 2]].norm(dim=1).min() > 0.1


def test_padding_and_neighbours_in_the_batch_do_not_show_and_order_does():
    encoder = CaptionEncoder(DESCRIBED, TextEncoder(layers=2, width=16, heads=2), 24)
    initialise(encoder, 0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)  # so that attention is not almost even
    captions = torch.tensor([[5, 9, 2, 0, 0, 0], [4, 5, 6, 7, 8, 9]])
    together, words = encoder(captions)
    alone, its_words = encoder(torch.tensor([[5, 9, 2]]))
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(its_words[0], words[0, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(captions[1:])[0][0], together[1], atol=1e-5, rtol=1e-5)
    turned = encoder(torch.tensor([[9, 5, 2, 0, 0, 0]]))[0][0]
    assert (turned - together[0]).norm() > 0.01 * together[0].norm()


def test_augmentation_of_zeros_says_nothing_and_the_rest_adds_up():
    network = condition("class", augmentation_width=4)
    nothing = network(LEVELS).vector
    one, other = torch.randn(2, 3, 4)
    assert torch.equal(network(LEVELS, augmentation=torch.zeros(3, 4)).vector, nothing)
    separately = (network(LEVELS, augmentation=x).vector - nothing for x in (one, other))
    torch.testing.assert_close(sum(separately), network(LEVELS, augmentation=one + other).vector - nothing)


def test_first_weights_are_a_function_of_the_name_and_make_all_parts_heard():
    one, other = condition("class", 4).state_dict(), condition("text", 4).state_dict()
    assert torch.equal(one["noise.up.weight"], other["noise.up.weight"])
    assert torch.equal(one["augmentation.weight"], other["augmentation.weight"])
    assert other["caption.encoder.embedding.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    wide = Condition(DESCRIBED, "class", 64, 512, TextEncoder())
    initialise(wide, 0)
    noise = wide.noise(torch.rand(200)).std()
    assert 0.5 < wide.classes.weight.std() / noise < 2

"""The state of the two players: running means, the spread of images, and what is told of them."""

import math

import pytest
import torch

from genscale.objectives.balance import Balance, spread

HEALTHY = {"real_logit": 1.0, "gap": 1.5, "sign": 0.5, "diversity": 0.9}


def played(steps=400, samples=64, signs=True, **measured):
    balance = Balance(signs)
    for _ in range(steps):
        balance.observe(samples, **{**HEALTHY, **measured})
    return balance


def test_means_begin_as_plain_ones_and_forget_with_their_half_life():
    balance = Balance(signs=True)
    for value in (1.0, 2.0, 6.0):
        balance.observe(10, real_logit=value)
    assert balance.real_logit.item() == pytest.approx(3.0, rel=1e-5)
    balance = played(real_logit=0.0)
    for _ in range(20):
        balance.observe(100, real_logit=8.0)
    assert balance.real_logit.item() == pytest.approx(4.0, rel=1e-3), "after 2,000 images more"


def test_what_is_not_finite_is_passed_over():
    balance = played(diversity=0.7)
    balance.observe(64, diversity=math.nan, sign=math.inf)
    assert balance.diversity.item() == pytest.approx(0.7)
    assert balance.sign.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("measured", "kind", "advice"),
    [
        ({"diversity": 0.02}, "collapse", "objective.r1"),
        ({"sign": 0.999, "gap": 8.0}, "discriminator_wins", "target: 0.6"),
        ({"gap": 1000.0}, "discriminator_wins", "right about 75"),
        ({"sign": -0.6, "gap": -1.0}, "generator_wins", "right about only 20%"),
    ],
)
def test_each_concern_is_named_with_what_to_try(measured, kind, advice):
    found = played(**measured).concerns()
    assert list(found) == [kind]
    assert advice in found[kind]
    assert "; try " in found[kind]
    assert not played(steps=100, **measured).concerns(), "the first 10,000 images are a beginning"


def test_a_healthy_game_is_no_concern():
    assert played().concerns() == {}
    assert played(sign=0.9, diversity=0.4, gap=20.0).concerns() == {}
    assert played(sign=1.0, gap=0.4).concerns() == {}, "always right by a little, as under strong penalties"
    assert played(sign=-0.1).concerns() == {}
    assert played(sign=1.0, gap=8.0, signs=False).concerns() == {}, "a Wasserstein critic is to be right"


def test_a_concern_goes_when_its_cause_does():
    balance = played(diversity=0.02)
    for _ in range(400):
        balance.observe(64, **HEALTHY)
    assert balance.concerns() == {}


def test_the_state_is_in_buffers():
    balance, other = played(sign=0.999, gap=8.0), Balance(signs=True)
    other.load_state_dict(balance.state_dict())
    assert other.concerns() == balance.concerns() != {}


def test_spread_compares_images_of_one_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    centres = 5 * torch.randn(4, 1, 4, 4, generator=generator)
    real = centres[labels] + torch.randn(64, 1, 4, 4, generator=generator)
    alike = centres[labels] + torch.randn(64, 1, 4, 4, generator=generator)

    def ratio(fake, labels):
        of_fake, of_real = spread(fake, real, labels)
        return (of_fake / of_real).item()

    assert ratio(alike, labels) == pytest.approx(1, rel=0.15)
    assert ratio(centres[labels], labels) < 0.01, "one image for each class"
    assert ratio(centres[labels], None) > 0.5, "which is not seen without the labels"
    assert ratio(centres[:1].expand(64, -1, -1, -1), None) == 0
    assert [each.item() for each in spread(real[:1], real[:1], labels[:1])] == [0, 0]

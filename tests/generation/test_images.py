"""Drawing: an image is a function of the weights, the seed and its number."""

import math

import pytest
import torch
from torch import nn

from genscale.data.description import ImageDescription
from genscale.generation.images import Start, between, cells, class_numbers, draw, preview_grid
from genscale.objectives.adversarial import Adversarial
from genscale.objectives.conditioning import Conditioning
from genscale.objectives.objective import Objective
from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.sampling import ImageSampling
from genscale.runtime.errors import UserError

CLASSES = ("ankle boot", "Bag", "coat")
IMAGES = ImageDescription(channels=1, resolution=4, classes=CLASSES)
CPU = torch.device("cpu")


class Blur(Objective):
    """A model in closed form: half of the noise, pushed to its class's level, around the image to start from."""

    def __init__(self, conditioning="class"):
        super().__init__()
        self.networks = nn.ModuleDict({"model": nn.Linear(1, 1)})
        self.conditioning = Conditioning(conditioning, 0.1, len(CLASSES), 5)
        self.requests = []

    def sample(self, request, rng):
        self.requests.append(request)
        noise = rng.normal("noise", (1, 4, 4)) if request.noise is None else request.noise
        image = noise / 2
        if request.labels is not None:
            image = image + request.labels.view(-1, 1, 1, 1)
        if request.image is not None:
            image = torch.lerp(request.image, image, request.strength)
        return image


def drawn(objective, *, sampling=None, described=IMAGES, **how):
    how = {"count": 7, "seed": 3, "device": CPU, **how}
    return draw(objective, described, sampling or ImageSampling(), **how)


@pytest.fixture(scope="module")
def gan():
    recipe = recipe_from_mapping(
        {
            "data": {"kind": "images"},
            "model": {"kind": "gan", "latent": 6, "generator": [8, 8], "discriminator": [8, 8], "group_width": None},
            "objective": {"kind": "adversarial"},
            "training": {"budget": "100 samples", "batch": "4 samples"},
        }
    )
    objective = Adversarial(recipe, IMAGES)
    torch.manual_seed(0)
    for parameter in objective.parameters():  # the blocks begin as the identity, the biases at 0
        nn.init.normal_(parameter, std=0.2)
    return objective


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_an_image_does_not_depend_on_the_batch_or_on_how_many_there_are(batch, gan):
    for objective in (Blur(), gan):
        alone = drawn(objective, batch=7)
        torch.testing.assert_close(drawn(objective, batch=batch), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(drawn(objective, batch=batch, count=4), alone[:4], rtol=0, atol=1e-6)
        assert not torch.equal(drawn(objective, seed=4), alone)


def test_images_are_float32_within_the_range_and_their_number_is_told():
    told = []
    images = drawn(Blur(), count=7, batch=3, on_images=told.append)
    assert (images.shape, images.dtype) == ((7, 1, 4, 4), torch.float32)
    assert images.abs().max() == 1  # class 2 lies beyond
    assert told == [3, 3, 1]


def asked(objective):
    return torch.cat([request.labels for request in objective.requests]).tolist()


def test_classes_are_taken_in_turn():
    for how, expected in (
        ({}, [0, 1, 2, 0, 1, 2, 0]),
        ({"labels": [2, 0]}, [2, 0, 2, 0, 2, 0, 2]),
        ({"sampling": ImageSampling(labels=("coat",))}, [2] * 7),
        ({"labels": [1], "sampling": ImageSampling(labels=("coat",))}, [1] * 7),
    ):
        for batch in (2, 64):
            objective = Blur()
            drawn(objective, batch=batch, **how)
            assert asked(objective) == expected


def test_a_model_that_knows_no_classes_is_asked_for_none():
    objective = Blur("none")
    drawn(objective)
    assert objective.requests[0].labels is None


def test_captions_are_taken_in_turn():
    objective = Blur("text")
    drawn(objective, captions=torch.tensor([[1, 2], [3, 0]]), batch=2)
    assert torch.cat([request.captions for request in objective.requests]).tolist() == [[1, 2], [3, 0]] * 3 + [[1, 2]]


def test_what_sampling_says_is_asked_of_the_model():
    objective, guide = Blur(), Blur()
    sampling = ImageSampling(sampler="euler", steps=9, guidance=2.5, guidance_interval=(0.25, 0.75), truncation=0.5)
    drawn(objective, sampling=sampling, guide=guide)
    request = objective.requests[0]
    assert (request.sampler, request.steps, request.guidance) == ("euler", 9, 2.5)
    assert (request.guidance_interval, request.truncation, request.guide) == ((0.25, 0.75), 0.5, guide)


def test_every_image_starts_from_the_picture_under_the_mask():
    objective = Blur()
    picture, mask = torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    images = drawn(objective, start=Start(picture, 1e-6, mask), batch=3)
    torch.testing.assert_close(images, picture.expand(7, 1, 4, 4), rtol=0, atol=1e-4)
    assert [tuple(request.mask.shape) for request in objective.requests] == [(3, 1, 4, 4), (3, 1, 4, 4), (1, 1, 4, 4)]


def test_an_arc_ends_at_both_draws_and_turns_evenly():
    torch.manual_seed(0)
    one, other = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    assert torch.equal(between(one, other, torch.zeros(5)), one)
    torch.testing.assert_close(between(one, other, torch.ones(5)), other)
    units = [each / each.flatten(1).norm(dim=1).view(5, 1, 1) for each in (one, other)]
    whole = torch.acos((units[0] * units[1]).flatten(1).sum(1))
    for part in (0.2, 0.5, 0.9):
        on_the_arc = between(*units, torch.full((5,), part))
        torch.testing.assert_close(on_the_arc.flatten(1).norm(dim=1), torch.ones(5))
        turned = torch.acos((units[0] * on_the_arc).flatten(1).sum(1))
        torch.testing.assert_close(turned, part * whole, rtol=1e-4, atol=1e-4)


def test_an_arc_between_draws_of_one_direction_is_straight():
    one = torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    other = torch.tensor([[3.0, 6.0], [-3.0, 0.0]])
    torch.testing.assert_close(between(one, other, torch.full((2,), 0.5)), torch.tensor([[2.0, 4.0], [-1.0, 0.0]]))


def test_halfway_noise_is_as_likely_as_noise():
    torch.manual_seed(0)
    one, other = torch.randn(2, 400, 1000)
    halfway = between(one, other, torch.full((400,), 0.5))
    assert halfway.std().item() == pytest.approx(1, abs=0.005)
    assert torch.lerp(one, other, 0.5).std().item() == pytest.approx(math.sqrt(0.5), abs=0.005)  # what it is not


def test_each_way_goes_from_the_image_of_one_seed_to_that_of_the_other(gan):
    for objective in (Blur("none"), gan):
        frames = drawn(objective, count=12, seed=3, start=Start(towards=9, frames=4), batch=5)
        labels = None if objective is not gan else [0, 1, 2]
        first = drawn(objective, count=3, seed=3, labels=labels)
        last = drawn(objective, count=3, seed=9, labels=labels)
        torch.testing.assert_close(frames[::4], first, rtol=0, atol=1e-5)
        torch.testing.assert_close(frames[3::4], last, rtol=0, atol=1e-5)
        assert not torch.equal(frames[1::4], first)


def test_the_frames_of_one_way_are_of_one_class():
    objective = Blur()
    drawn(objective, count=8, start=Start(towards=9, frames=3), batch=4)
    assert asked(objective) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_preview_shows_the_same_images_each_time(gan):
    sampling = ImageSampling(count=12)
    shown = preview_grid(gan, IMAGES, sampling, seed=5)
    assert (shown.shape, shown.dtype.name) == ((12, 16, 1), "uint8")
    assert (preview_grid(gan, IMAGES, sampling, seed=5) == shown).all()
    assert (preview_grid(gan, IMAGES, sampling, seed=6) != shown).any()


def test_a_preview_of_a_model_of_captions_draws_without_one():
    objective = Blur("text")
    described = ImageDescription(channels=1, resolution=4, caption_vocabulary=300, caption_tokens=5)
    preview_grid(objective, described, ImageSampling(count=2), seed=0)
    assert objective.requests[0].captions.tolist() == [[0] * 5] * 2


def test_columns_are_classes_where_they_fill_the_rows():
    assert cells(80, 10) == (8, 10)
    assert cells(64, 10) == (8, 8)
    assert cells(64, 1) == (8, 8)
    assert cells(64, 64) == (8, 8)
    assert cells(1, 1) == (1, 1)


def test_classes_are_known_by_name_in_any_case_or_by_number():
    assert class_numbers(["coat", "BAG", "0"], CLASSES) == [2, 1, 0]
    assert class_numbers(["7", "a", "A"], ["A", "7", "a"]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("names", "classes", "words"),
    [
        (["Bags"], CLASSES, "no class 'Bags', did you mean 'Bag'"),
        (["zebra"], CLASSES, "no class 'zebra'; there are ankle boot, Bag, coat"),
        (["3"], CLASSES, "no class '3'"),
        (["x"], [f"c{number}" for number in range(1000, 1100)], "c1019 and 80 more"),
        (["x"], (), "have no classes"),
    ],
)
def test_a_class_that_is_not_there_is_told_in_one_line(names, classes, words):
    with pytest.raises(UserError, match=words) as error:
        class_numbers(names, classes)
    assert "\n" not in str(error.value)

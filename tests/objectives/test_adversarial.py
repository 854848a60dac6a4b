"""Adversarial training: phases, penalties, accumulation, validation, sampling, and the state of the players."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from genscale.data.description import ImageDescription
from genscale.data.image_batch import ImageBatch
from genscale.objectives.build import build_objective
from genscale.objectives.image_request import ImageRequest
from genscale.recipe.image_data import ImageData
from genscale.recipe.image_model import GANModel
from genscale.recipe.image_objective import AdversarialObjective, Augmentation
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Training
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

SHAPE = GANModel(latent=5, generator=(8, 4), discriminator=(4, 8), group_width=4, embedding=4)
LOSSES = ("relativistic", "non_saturating", "hinge", "wasserstein")
PENALTIES = {
    "r1": {"r1": 3.0, "r2": 0.0},
    "r2": {"r1": 0.0, "r2": 3.0},
    "both": {"r1": 2.0, "r2": 3.0},
    "between": {"r1": 0.0, "r2": 0.0, "gradient_penalty": 5.0},
    "path": {"r1": 0.0, "r2": 0.0, "path_length": 2.0},
}


def build(classes=3, channels=1, lively=True, shape=SHAPE, **options):
    """``lively``: with weights that are large everywhere, so that nothing is zero that need not be."""
    training = Training(budget="64 steps")
    recipe = Recipe(data=ImageData(), model=shape, objective=AdversarialObjective(**options), training=training)
    names = tuple(f"class {i}" for i in range(classes))
    objective = build_objective(recipe, ImageDescription(channels, 8, names)).double()
    if lively:
        generator = torch.Generator().manual_seed(3)
        for parameter in objective.parameters():
            torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return objective


def random_batch(size, labels=True, start=0):
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(size, 1, 8, 8, generator=generator).double() * 2 - 1
    kinds = torch.randint(3, (size,), generator=generator) if labels else None
    return ImageBatch(images, kinds, None, torch.arange(start, start + size))


def part(batch, start, stop):
    labels = None if batch.labels is None else batch.labels[start:stop]
    return ImageBatch(batch.images[start:stop], labels, None, batch.positions[start:stop])


def phase_of(objective, name):
    return next(phase for phase in objective.phases if phase.name == name)


def gradient(objective, phase, batches, step=3):
    """As the training loop does it: of the trained network only, totals, divided once by the global weight."""
    for name, network in objective.networks.items():
        network.requires_grad_(name == phase.trains)
        network.zero_grad()
    weight = sum(objective.weight(phase, batch) for batch in batches)
    losses = []
    for batch in batches:
        rng = Rng(0, step, phase.name, batch.positions)
        losses.append(objective.loss(phase, batch, rng, objective.scalars(0.0)))
        (losses[-1].total / weight).backward()
    parameters = objective.networks[phase.trains].parameters()
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    others = [p.grad for name, net in objective.networks.items() if name != phase.trains for p in net.parameters()]
    assert all(each is None for each in others)
    return found, losses


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("lazy", [1, 4])
def test_accumulation_does_not_change_the_gradient_of_any_phase(kind, penalty, lazy):
    augmentation = Augmentation(flip=True, translate=0.2, cutout=0.3)
    objective = build(loss=kind, lazy=lazy, augmentation=augmentation, **PENALTIES[penalty])
    batch = random_batch(8)
    assert len(objective.phases) == (2 if lazy == 1 else 3)
    for phase in objective.phases:
        whole, _ = gradient(objective, phase, [batch])
        assert whole.norm() > 1e-6
        for pieces in ([0, 8], [0, 4, 8], [0, 2, 4, 6, 8], [0, 1, 5, 8]):
            parts = [part(batch, *ends) for ends in pairwise(pieces)]
            found, _ = gradient(objective, phase, parts)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-12 * max(1, whole.abs().max().item()))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_lazy_penalties_are_equal_in_expectation(penalty):
    """Over ``lazy`` steps they add up to what they are when taken at every step."""
    at_once, lazily = build(**PENALTIES[penalty]), build(lazy=4, **PENALTIES[penalty])
    free = build(r1=0.0, r2=0.0)
    batch = random_batch(6)
    name = "generator" if penalty == "path" else "discriminator"

    def found(objective, phase_name):
        phase = phase_of(objective, phase_name)
        rng = Rng(0, 3, name, batch.positions)  # the same latents for all three
        for each, network in objective.networks.items():
            network.requires_grad_(each == phase.trains)
            network.zero_grad()
        objective.loss(phase, batch, rng, objective.scalars(0.0)).total.backward()
        parameters = objective.networks[name].parameters()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])

    together, game, penalties = found(at_once, name), found(free, name), found(lazily, f"{name}_penalty")
    assert penalties.norm() > 1e-6
    torch.testing.assert_close(game + penalties / 4, together)
    phase = phase_of(lazily, f"{name}_penalty")
    assert (phase.every, phase.differentiates_twice) == (4, True)
    assert not phase_of(lazily, name).differentiates_twice
    assert phase_of(at_once, name).differentiates_twice
    torch.testing.assert_close(found(lazily, name), game)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_gradient_of_a_penalised_loss_is_that_of_finite_differences(penalty):
    objective = build(**PENALTIES[penalty])
    name = "generator" if penalty == "path" else "discriminator"
    phase, batch = phase_of(objective, name), random_batch(3)
    exact, _ = gradient(objective, phase, [batch])
    parameters = list(objective.networks[name].parameters())
    direction = torch.randn(len(exact), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    values = []
    for step in (1e-6, -1e-6):
        torch.nn.utils.vector_to_parameters(start + step * direction, parameters)
        rng = Rng(0, 3, name, batch.positions)
        values.append(objective.loss(phase, batch, rng, objective.scalars(0.0)).total.item() / 3)
    assert (exact * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_of_a_step_are_those_written_by_hand(kind):
    objective = build(loss=kind, r1=2.0, r2=4.0)
    batch, scalars = random_batch(5), objective.scalars(0.0)
    generator, discriminator = objective.networks["generator"], objective.networks["discriminator"]

    def draw(rng):
        return generator(rng.normal("latent", (5,)).double(), batch.labels)

    rng = Rng(0, 9, "discriminator", batch.positions)
    fake, real = draw(rng).detach().requires_grad_(), batch.images.clone().requires_grad_()
    on_real, on_fake = discriminator(real, batch.labels), discriminator(fake, batch.labels)
    squares = [
        torch.autograd.grad(logits.sum(), images, retain_graph=True)[0].square().sum()
        for logits, images in ((on_real, real), (on_fake, fake))
    ]
    game = {
        "relativistic": lambda r, f: -torch.sigmoid(r - f).log(),
        "non_saturating": lambda r, f: -torch.sigmoid(r).log() - torch.sigmoid(-f).log(),
        "hinge": lambda r, f: (1 - r).clamp(min=0) + (1 + f).clamp(min=0),
        "wasserstein": lambda r, f: f - r,
    }[kind](on_real, on_fake).sum()
    found = objective.loss(phase_of(objective, "discriminator"), batch, rng, scalars)
    torch.testing.assert_close(found.total, game + squares[0] + 2 * squares[1])
    torch.testing.assert_close(found.metrics["loss"][0], game.detach(), msg="the metric is the game alone")
    torch.testing.assert_close(found.metrics["r1"][0], squares[0])
    torch.testing.assert_close(found.metrics["r2"][0], squares[1])
    torch.testing.assert_close(found.metrics["real_logit"][0], on_real.sum().detach())
    signs = (on_real - on_fake if kind in ("relativistic", "wasserstein") else on_real).sign().sum()
    assert found.metrics["sign"][0] == signs
    assert all(count == 5 for _, count in found.metrics.values())

    rng = Rng(0, 9, "generator", batch.positions)
    on_fake = discriminator(draw(rng), batch.labels)
    game = {
        "relativistic": lambda r, f: -torch.sigmoid(f - r).log(),
        "non_saturating": lambda r, f: -torch.sigmoid(f).log(),
    }.get(kind, lambda r, f: -f)(on_real, on_fake).sum()
    found = objective.loss(phase_of(objective, "generator"), batch, rng, scalars)
    torch.testing.assert_close(found.total, game)
    assert "diversity" in found.metrics


def inputs_of(network):
    """The first argument of each call, as they come."""
    seen = []
    network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    return seen


def test_phases_draw_latents_of_their_own_and_the_generator_is_not_told_of_the_judge():
    objective = build()
    batch, seen = random_batch(4), inputs_of(objective.networks["generator"])
    for phase in objective.phases:
        gradient(objective, phase, [batch])
    assert not torch.equal(*seen)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_the_batch_is_left_as_it_was():
    objective = build()
    batch = random_batch(4)
    before = batch.images.clone()
    for phase in objective.phases:
        gradient(objective, phase, [batch])
    assert torch.equal(batch.images, before)
    assert not batch.images.requires_grad


def test_penalty_weights_fall_along_a_cosine():
    objective = build(r1=4.0, r2=2.0, penalty_final=0.25)
    assert objective.scalars(0.0) == {"r1": 4.0, "r2": 2.0}
    assert objective.scalars(1.0) == pytest.approx({"r1": 1.0, "r2": 0.5})
    assert objective.scalars(0.5) == pytest.approx({"r1": 2.5, "r2": 1.25})
    batch, phase = random_batch(4), objective.phases[0]
    totals = {
        progress: objective.loss(phase, batch, Rng(0, 0, "discriminator", batch.positions), objective.scalars(progress))
        for progress in (0.0, 1.0)
    }
    game = totals[0.0].metrics["loss"][0]
    assert (totals[1.0].total - game).item() == pytest.approx((totals[0.0].total - game).item() / 4)


def test_the_mean_path_length_follows_slowly_and_is_kept_with_the_controls():
    objective = build(**PENALTIES["path"])
    phase, batch = phase_of(objective, "generator"), random_batch(4)
    _, (loss,) = gradient(objective, phase, [batch])
    length = (loss.metrics["path_length"][0] / 4).item()
    objective.observe({"generator_path_length": length}, 4)
    assert objective.path_length.item() == pytest.approx(0.01 * length)
    objective.path_length.fill_(length)
    _, (pulled,) = gradient(objective, phase, [batch])
    assert pulled.total < loss.total, "lengths near their mean cost less"
    controls = [name for name, _ in objective.named_buffers() if not name.startswith("networks.")]
    assert "path_length" in controls
    assert "balance.seen" in controls


def test_both_players_see_the_same_changes_and_leaky_ones_are_for_real_images():
    for leaky in (False, True):
        objective = build(augmentation=Augmentation(cutout=0.5, probability=1.0, leaky=leaky), r1=0.0, r2=0.0)
        batch, seen = random_batch(4), inputs_of(objective.networks["discriminator"])
        gradient(objective, objective.phases[0], [batch])
        real, fake = ((images == 0).flatten(1).any(1).all() for images in seen)  # grey squares
        assert real
        assert fake == (not leaky)


def test_an_adaptive_probability_rises_when_the_discriminator_is_always_right():
    changes = Augmentation(flip=True, probability=0.0, target=0.6, speed="1000 samples")
    objective = build(augmentation=changes)
    for _ in range(8):
        objective.observe({"discriminator_sign": 0.9}, 50)
    risen = objective.adaptive.probability.item()
    assert risen > 0.2
    for _ in range(8):
        objective.observe({"discriminator_sign": 0.1}, 50)
    assert objective.adaptive.probability.item() < risen


def validated(objective, batches):
    with torch.no_grad():
        losses = [objective.validate(batch, Rng(0, 0, "validate", batch.positions)) for batch in batches]
    means = {}
    for name in losses[0].metrics:
        total = sum(loss.metrics[name][0].double() for loss in losses)
        means[name] = total / sum(loss.metrics[name][1].double() for loss in losses)
    return objective.scores(means)


def test_scores_do_not_depend_on_the_batch_and_tell_the_gap_on_held_out_images():
    objective = build().eval()
    batch = random_batch(40)
    whole = validated(objective, [batch])
    parts = validated(objective, [part(batch, 0, 13), part(batch, 13, 40)])
    for name in ("loss", "real_logit", "fake_logit"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6, abs=1e-7)
    assert "discriminator_gap" not in whole, "nothing was trained yet"
    real, fake = whole["real_logit"], whole["fake_logit"]
    objective.observe({"discriminator_real_logit": real + 2, "discriminator_fake_logit": fake}, 100)
    after = validated(objective, [batch])
    assert after["discriminator_gap"] == pytest.approx(2, rel=1e-5)
    assert after["overfitting"] == pytest.approx(2 / (real + 2 - fake), rel=1e-5)
    assert after["loss"] == whole["loss"], "what runs are compared by is fixed"


def test_the_loss_of_validation_is_lower_for_a_generator_that_draws_the_data():
    objective = build(lively=False).float().eval()
    batch = random_batch(64)
    batch = ImageBatch(batch.images.float(), batch.labels, None, batch.positions)

    class Drawn(torch.nn.Module):
        def forward(self, latents, labels):
            return torch.rand(len(latents), 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1

    before = validated(objective, [batch])["loss"]
    objective.networks["generator"] = Drawn()
    assert validated(objective, [batch])["loss"] < 0.2 * before


def test_concerns_fire_for_a_collapse_and_not_for_a_healthy_game():
    healthy = {
        "discriminator_real_logit": 1.0,
        "discriminator_fake_logit": -1.0,
        "discriminator_sign": 0.4,
        "generator_diversity": 0.95,
    }
    objective = build()
    for _ in range(300):
        objective.observe(healthy, 64)
    assert objective.concerns(healthy) == {}
    for _ in range(300):
        objective.observe({**healthy, "generator_diversity": 0.01}, 64)
    assert list(objective.concerns(healthy)) == ["collapse"]
    for _ in range(300):
        objective.observe({**healthy, "discriminator_sign": 1.0, "discriminator_real_logit": 20.0}, 64)
    assert "discriminator_wins" in objective.concerns(healthy)


def test_unknown_and_missing_labels():
    objective = build()
    batch = random_batch(4)
    unknown = ImageBatch(batch.images, torch.full((4,), -1), None, batch.positions)
    missing = ImageBatch(batch.images, None, None, batch.positions)
    phase = objective.phases[0]
    totals = [
        objective.loss(phase, each, Rng(0, 0, "x", batch.positions), objective.scalars(0)).total
        for each in (unknown, missing, batch)
    ]
    assert totals[0] == totals[1] != totals[2]


def test_classes_are_used_where_the_data_has_them():
    assert build(classes=3).conditional
    assert not build(classes=0).conditional
    assert not build(classes=3, conditioning="none").conditional
    with pytest.raises(UserError, match=r"objective.conditioning: 'class' needs labels"):
        build(classes=0, conditioning="class")
    objective = build(classes=0)
    for phase in objective.phases:
        gradient(objective, phase, [random_batch(3, labels=False)])


def request_of(objective, positions, **request):
    return objective.sample(ImageRequest(**request), Rng(0, 0, "sample", torch.tensor(positions)))


def test_a_seed_gives_the_same_image_at_any_batch_size():
    objective = build().float()
    for labels in (None, torch.tensor([0, 1, 2, 0])):
        whole = request_of(objective, [4, 5, 6, 7], labels=labels)
        assert whole.shape == (4, 1, 8, 8)
        alone = request_of(objective, [6], labels=None if labels is None else labels[2:3])
        torch.testing.assert_close(alone[0], whole[2], rtol=0, atol=1e-5)
    assert not torch.allclose(whole[0], whole[3]), "one class, two latents"


def test_truncation_and_latents():
    objective = build(classes=0).float()
    latents = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    given = request_of(objective, [0, 1], latents=latents)
    torch.testing.assert_close(request_of(objective, [8, 9], latents=latents), given)
    mean = request_of(objective, [0, 1], truncation=0.0)
    torch.testing.assert_close(mean[0], mean[1])
    half = request_of(objective, [0, 1], latents=latents, truncation=0.5)
    torch.testing.assert_close(half, request_of(objective, [0, 1], latents=latents / 2))


def test_impossible_requests_are_user_errors():
    objective, image = build(), torch.zeros(1, 1, 8, 8)
    for request, message in (
        ({"image": image}, "needs a diffusion run, not a GAN"),
        ({"captions": torch.zeros(1, 4, dtype=torch.long)}, "knows no captions"),
        ({"latents": torch.zeros(1, 7)}, r"expected the shape \(1, 5\), not \(1, 7\)"),
        ({"labels": torch.tensor([3])}, "label 3: the classes are numbered from 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            request_of(objective, [0], **request)
    with pytest.raises(UserError, match="knows no classes"):
        request_of(build(classes=0), [0], labels=torch.tensor([1]))


class Counter(TorchDispatchMode):
    """Counts as FlopCounterMode does, which also follows modules, and fails where a gradient has a gradient."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("loss", ["relativistic", "hinge"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("lazy", [1, 4])
def test_operations_are_as_many_as_are_counted(loss, penalty, lazy):
    shape = SHAPE.model_copy(update={"group_width": None})  # torch counts the backward of groups as if they were one
    objective = build(loss=loss, lazy=lazy, shape=shape, **PENALTIES[penalty])
    batch, counted = random_batch(4), 0.0
    for phase in objective.phases:
        with Counter() as counter:
            gradient(objective, phase, [batch])
        counted += counter.flops / 4 / phase.every
    # The first layer of a backward that goes no further is left out of the count by closed form.
    assert objective.flops_per_sample() == pytest.approx(counted, rel=0.15)
    assert objective.rows_per_sample() == 64


@pytest.mark.parametrize("penalty", PENALTIES)
def test_memory_is_about_what_is_kept_for_the_backward(penalty):
    objective, batch, largest = build(**PENALTIES[penalty]), random_batch(16), 0
    weights = {parameter.data_ptr() for parameter in objective.parameters()}
    for phase in objective.phases:
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradient(objective, phase, [batch])
        sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
        largest = max(largest, sum(sizes) / len(batch))
    assert 0.7 < objective.activation_bytes_per_sample(8) / largest < 1.6


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_direction_of_a_penaltys_gradient(precision):
    """Against float64: what autocast costs is far below the noise of a batch."""
    objective, batch = build(r1=2.0, r2=2.0, lazy=4, lively=False), random_batch(16)
    phase = phase_of(objective, "discriminator_penalty")
    exact, _ = gradient(objective, phase, [batch])
    objective = objective.float()
    batch = ImageBatch(batch.images.float(), batch.labels, None, batch.positions)
    with torch.autocast("cpu", precision):
        found, _ = gradient(objective, phase, [batch])
    cosine = torch.nn.functional.cosine_similarity(found.double(), exact, dim=0)
    assert cosine > (0.999 if precision is torch.bfloat16 else 1 - 1e-6), "fp16 gives way to float32"
    assert math.isclose(found.norm().item(), exact.norm().item(), rel_tol=0.01)

"""The objectives of diffusion: what they noise and compare, how losses are normalised, and that they draw what they
learned."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from genscale.data.description import ImageDescription
from genscale.data.image_batch import ImageBatch
from genscale.objectives.augmentation import AUGMENTATION_WIDTH
from genscale.objectives.build import build_objective
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.noise_levels import alpha_bar
from genscale.recipe.image_data import ImageData
from genscale.recipe.image_model import DiffusionTransformerModel, TextEncoder, UNetModel
from genscale.recipe.image_objective import Augmentation, DDPMObjective, EDMObjective, FlowObjective
from genscale.recipe.sampling import ImageSampling
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Training
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

OBJECTIVES = {
    "flow": FlowObjective(),
    "edm": EDMObjective(),
    "epsilon": DDPMObjective(min_snr=5.0),
    "v": DDPMObjective(prediction="v", noise_schedule="cosine", zero_terminal_snr=True),
    "x0": DDPMObjective(prediction="x0"),
}
LABELLED = ImageDescription(1, 8, ("cat", "dog", "owl"))
CAPTIONED = ImageDescription(3, 8, (), caption_vocabulary=20, caption_tokens=4)
TRANSFORMER = DiffusionTransformerModel(
    layers=1, width=16, heads=2, patch=4, text_encoder=TextEncoder(layers=1, width=8, heads=2)
)
UNET = UNetModel(width=8, multipliers=(1, 2), blocks=1, attention=(), head_width=8)


def recipe(options, model, seed=0, **sampling):
    return Recipe(
        data=ImageData(),
        model=model,
        objective=options,
        training=Training(batch="8 images", budget="800 images"),
        sampling=ImageSampling(**sampling),
        seed=seed,
    )


def build(options, described=LABELLED, model=TRANSFORMER, seed=0):
    options = OBJECTIVES[options] if isinstance(options, str) else options
    objective = build_objective(recipe(options, model, seed), described)
    draws = torch.Generator().manual_seed(seed)  # some weights are zero at first, and hide what comes before them
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return objective


def some_batch(size, described=LABELLED, dtype=torch.float32):
    draws = torch.Generator().manual_seed(3)
    side = described.resolution
    images = torch.rand(size, described.channels, side, side, generator=draws, dtype=dtype) * 2 - 1
    labels = torch.randint(3, (size,), generator=draws) if described.classes else None
    captions = torch.randint(1, 20, (size, 4), generator=draws) if described.caption_vocabulary else None
    return ImageBatch(images, labels, captions, torch.arange(size))


def part(batch, start, stop):
    cut = [None if value is None else value[start:stop] for value in (batch.images, batch.labels, batch.captions)]
    return ImageBatch(*cut, batch.positions[start:stop])


def rng(batch, step=3, phase="train"):
    return Rng(0, step, phase, batch.positions)


def gradient(objective, batches):
    """As the training loop does it: totals, divided once by the global weight."""
    objective.zero_grad()
    phase = objective.phases[0]
    weight = sum(objective.weight(phase, batch) for batch in batches)
    for batch in batches:
        (objective.loss(phase, batch, rng(batch), {}).total / weight).backward()
    return torch.cat([parameter.grad.flatten() for parameter in objective.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("model", "described"), [(TRANSFORMER, CAPTIONED), (UNET, LABELLED)], ids=["text", "class"])
def test_accumulation_does_not_change_the_gradient(name, model, described):
    changes = Augmentation(probability=0.5, flip=True, translate=0.2)
    options = OBJECTIVES[name].model_copy(update={"learned_uncertainty": True, "augmentation": changes})
    objective = build(options, described, model).double()
    batch = some_batch(8, described, torch.float64)
    whole = gradient(objective, [batch])
    assert whole.norm() > 1e-3
    for size in (4, 2):
        accumulated = gradient(objective, [part(batch, i, i + size) for i in range(0, 8, size)])
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-10 * whole.abs().max().item())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_times_and_dropped_conditions_do_not_depend_on_the_micro_batch(name):
    objective = build(OBJECTIVES[name].model_copy(update={"condition_dropout": 0.5}))
    batch = some_batch(12)
    for phase in ("train", "validate"):
        inputs, targets = objective.prepare(batch, rng(batch, phase=phase))
        later = part(batch, 5, 9)
        again, same = objective.prepare(later, rng(later, phase=phase))
        for key in inputs:
            assert torch.equal(again[key], inputs[key][5:9]), key
        assert torch.equal(same.answer, targets.answer[5:9])
        other, _ = objective.prepare(batch, rng(batch, step=4, phase=phase))
        assert not torch.isclose(other["x"], inputs["x"]).all(dim=(1, 2, 3)).any()
    assert len(inputs["noise_level"].unique()) == 12
    assert not torch.isclose(inputs["x"][0], inputs["x"][1:]).all(dim=(1, 2, 3)).any()


class Known(nn.Module):
    """A network that answers for data that are one image; what it is told is read by the papers' formulas."""

    def __init__(self, kind, image):
        super().__init__()
        self.kind = kind
        self.image = nn.Parameter(image)

    def forward(self, x, noise_level, labels=None, captions=None, augmentation=None):
        level = noise_level.double().view(-1, 1, 1, 1)
        image = self.image.double()
        if self.kind == "flow":
            noise = (x - (1 - level) * image) / level
            return (noise - image).to(x.dtype)
        if self.kind == "edm":
            sigma = torch.exp(4 * level)
            root = (sigma**2 + 0.25).sqrt()
            noisy = x * root
            return ((image - 0.25 / root**2 * noisy) / (sigma * 0.5 / root)).to(x.dtype)
        steps = (level * 1000).round().long()
        bar = DDPM_SIGNAL[self.kind][steps]
        noise = (x - bar.sqrt() * image) / (1 - bar).sqrt()
        answers = {"epsilon": noise, "x0": image.expand_as(x), "v": bar.sqrt() * noise - (1 - bar).sqrt() * image}
        return answers[self.kind].to(x.dtype)


DDPM_SIGNAL = {name: alpha_bar(OBJECTIVES[name]) for name in ("epsilon", "v", "x0")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_network_that_knows_the_data_is_zero_and_it_draws_them(name):
    objective = build(name)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    objective.networks["model"] = Known(name, image)
    batch = replace(some_batch(64), images=image.expand(64, 1, 8, 8))
    loss = objective.loss(objective.phases[0], batch, rng(batch), {})
    assert loss.total.item() < 1e-4
    for sampler in ("auto", "euler", "heun", "ddim", "dpm_solver_2m", "ancestral"):
        drawn = objective.sample(ImageRequest(sampler=sampler, steps=7), Rng(0, 0, "sample", torch.arange(3)))
        assert drawn.dtype == torch.float32
        torch.testing.assert_close(drawn, image.expand(3, 1, 8, 8), rtol=0, atol=2e-3)


class Silent(nn.Module):
    """A network that always answers zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x, noise_level, **conditions):
        self.calls.append({"x": x, "noise_level": noise_level, **conditions})
        return self.weight * x


@pytest.mark.parametrize("resolution", [8, 16])
def test_the_loss_is_a_mean_over_pixels_summed_over_images(resolution):
    described = ImageDescription(3, resolution)
    objective = build("edm", described)
    objective.networks["model"] = Silent()
    draws = torch.Generator().manual_seed(1)
    images = 0.5 * torch.randn(256, 3, resolution, resolution, generator=draws)  # sigma_data
    batch = ImageBatch(images, None, None, torch.arange(256))
    total, metrics = objective.loss(objective.phases[0], batch, rng(batch), {})
    assert objective.weight(objective.phases[0], batch) == metrics["loss"][1] == 256
    assert (total / 256).item() == pytest.approx(1.0, abs=0.03)  # the answers' variance is 1 at every noise level
    assert metrics["loss"][0].item() == pytest.approx(total.item())


def test_validation_is_fixed_undropped_and_unaugmented_and_splits_the_loss_by_noise():
    changes = Augmentation(probability=1.0, flip=True, translate=0.3)
    objective = build(FlowObjective(condition_dropout=0.9, augmentation=changes, learned_uncertainty=True))
    batch = some_batch(30)
    phase = {"phase": "validate", "step": 0}
    whole = objective.validate(batch, rng(batch, **phase))
    parts = [objective.validate(piece, rng(piece, **phase)) for piece in (part(batch, 0, 7), part(batch, 7, 30))]
    for name, (total, count) in whole.metrics.items():
        assert sum(piece.metrics[name][0] for piece in parts).item() == pytest.approx(total.item(), rel=1e-4)
        assert sum(piece.metrics[name][1] for piece in parts) == count
    assert set(whole.metrics) == {"loss", "loss_low_noise", "loss_middle_noise", "loss_high_noise"}
    thirds = [metric for name, metric in whole.metrics.items() if name != "loss"]
    assert sum(total for total, _ in thirds).item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert [count.item() for _, count in thirds] == [pytest.approx(10, abs=1)] * 3
    inputs, _ = objective.prepare(batch, rng(batch, **phase), training=False)
    assert torch.equal(inputs["labels"], batch.labels)
    assert not inputs["augmentation"].any()
    means = {"loss": torch.tensor(0.5), "loss_low_noise": torch.tensor(math.nan)}
    assert objective.scores(means) == {"loss": 0.5}


def test_training_drops_conditions_and_tells_of_augmentation():
    changes = Augmentation(probability=0.7, flip=True)
    objective = build(FlowObjective(condition_dropout=0.25, augmentation=changes))
    batch = some_batch(400)
    inputs, targets = objective.prepare(batch, rng(batch))
    dropped = inputs["labels"] == 3
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(inputs["labels"][~dropped], batch.labels[~dropped])
    assert inputs["augmentation"].shape == (400, AUGMENTATION_WIDTH)
    changed = inputs["augmentation"].any(dim=1)
    assert 0.2 < changed.float().mean() < 0.8
    # The velocity is noise - image, and what was noised is the changed image.
    noise = Rng(0, 3, "train", batch.positions).normal("noise", (1, 8, 8))
    noised = noise - targets.answer
    flipped = torch.where(changed[:, None, None, None], batch.images.flip(-1), batch.images)
    torch.testing.assert_close(noised, flipped, rtol=0, atol=1e-5)

    leaky = build(FlowObjective(augmentation=changes.model_copy(update={"leaky": True})))
    assert "augmentation" not in leaky.prepare(batch, rng(batch))[0]


def test_learned_uncertainty_weighs_what_is_trained_and_not_what_is_reported():
    plain, learned = (build(FlowObjective(learned_uncertainty=on)) for on in (False, True))
    learned.networks["model"].network.load_state_dict(plain.networks["model"].state_dict())
    batch = some_batch(16)
    one, two = (objective.loss(objective.phases[0], batch, rng(batch), {}) for objective in (plain, learned))
    assert one.metrics["loss"][0].item() == pytest.approx(two.metrics["loss"][0].item(), rel=1e-6)
    inputs, targets = learned.prepare(batch, rng(batch))
    answer, uncertainty = learned.networks["model"](**inputs)
    errors = (answer - targets.answer).square().mean(dim=(1, 2, 3))
    assert uncertainty.std() > 1e-3
    assert two.total.item() == pytest.approx((errors / uncertainty.exp() + uncertainty).sum().item(), rel=1e-5)
    two.total.backward()
    assert learned.networks["model"].uncertainty.weight.grad.norm() > 0
    request, draws = ImageRequest(labels=batch.labels, steps=3), rng(batch, phase="sample")
    assert torch.equal(learned.sample(request, draws), plain.sample(request, draws))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_seed_gives_the_same_images_at_any_batch_size(name):
    objective = build(name)
    labels = torch.tensor([0, 1, 2, -1, 1])
    for guidance in (1.0, 2.0):
        request = ImageRequest(labels=labels, steps=3, guidance=guidance)
        together = objective.sample(request, Rng(5, 0, "sample", torch.arange(5)))
        later = replace(request, labels=labels[3:])
        alone = objective.sample(later, Rng(5, 0, "sample", torch.arange(3, 5)))
        torch.testing.assert_close(alone, together[3:], rtol=1e-4, atol=1e-4)
        other = objective.sample(request, Rng(6, 0, "sample", torch.arange(5)))
        assert not torch.isclose(other, together, atol=1e-3).all(dim=(1, 2, 3)).any()
    assert objective.networks["model"].training


def test_guidance_pushes_along_the_condition_and_asks_for_none_in_the_same_batch():
    objective = build("flow")
    silent = objective.networks["model"] = Silent()
    request = ImageRequest(labels=torch.tensor([0, 2]), sampler="euler", steps=2, guidance=3.0)
    objective.sample(request, Rng(0, 0, "sample", torch.arange(2)))
    assert [call["labels"].tolist() for call in silent.calls] == [[0, 2, 3, 3]] * 2
    silent.calls.clear()
    objective.sample(ImageRequest(sampler="euler", steps=2), Rng(0, 0, "sample", torch.arange(2)))
    assert [call["labels"].tolist() for call in silent.calls] == [[3, 3]] * 2


def test_autoguidance_asks_a_second_model_with_the_same_condition():
    objective, guide = build("flow"), build("flow", seed=1)
    labels = torch.tensor([0, 2])
    draws = Rng(0, 0, "sample", torch.arange(2))
    request = ImageRequest(labels=labels, sampler="euler", steps=1, guidance=2.5, guide=guide)
    ours, theirs = (
        one.sample(ImageRequest(labels=labels, sampler="euler", steps=1), draws) for one in (objective, guide)
    )
    torch.testing.assert_close(objective.sample(request, draws), theirs + 2.5 * (ours - theirs))
    bare = build("flow", ImageDescription(1, 8))  # without a condition there is still something to push away from
    alone = bare.sample(ImageRequest(sampler="euler", steps=1, guidance=2.0, guide=bare), draws)
    torch.testing.assert_close(alone, bare.sample(ImageRequest(sampler="euler", steps=1), draws))
    with pytest.raises(UserError, match="guide: it learned other noise levels"):
        objective.sample(replace(request, guide=build("edm")), draws)
    with pytest.raises(UserError, match="guide: expected a diffusion model that draws images of the same size"):
        objective.sample(replace(request, guide=build("flow", ImageDescription(3, 8))), draws)


def test_what_a_model_cannot_do_is_refused():
    draws = Rng(0, 0, "sample", torch.arange(2))
    with pytest.raises(UserError, match="guidance: 2 needs a model trained with a condition"):
        build("flow", ImageDescription(1, 8)).sample(ImageRequest(guidance=2.0), draws)
    with pytest.raises(UserError, match=r"more than the model learned \(objective.steps: 1000\)"):
        build("v").sample(ImageRequest(steps=1001), draws)
    with pytest.raises(UserError, match="truncation"):
        build("flow").sample(ImageRequest(truncation=0.5), draws)
    with pytest.raises(UserError, match=r"objective.conditioning: 'text' needs images with captions"):
        build(FlowObjective(conditioning="text"))


@pytest.mark.parametrize(
    ("options", "described", "sampling", "message"),
    [
        (FlowObjective(), ImageDescription(1, 8), {"guidance": 2.0}, "sampling.guidance: 2 needs a model trained with"),
        (FlowObjective(condition_dropout=0.0), LABELLED, {"guidance": 2.0}, "condition_dropout was 0"),
        (DDPMObjective(steps=10), LABELLED, {}, "sampling.steps: 20 are more than the model learned"),
        (EDMObjective(), LABELLED, {"truncation": 0.5}, "sampling.truncation and latents are for GANs"),
    ],
)
def test_a_recipe_whose_samples_cannot_be_drawn_is_refused_before_training(options, described, sampling, message):
    with pytest.raises(UserError, match=message):
        build_objective(recipe(options, TRANSFORMER, **sampling), described)


def test_captions_reach_the_network_and_guide_it():
    objective = build("flow", CAPTIONED)
    captions = torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]])
    draws = Rng(0, 0, "sample", torch.arange(2))
    none = objective.sample(ImageRequest(steps=2), draws)
    said = objective.sample(ImageRequest(captions=captions, steps=2), draws)
    followed = objective.sample(ImageRequest(captions=captions, steps=2, guidance=3.0), draws)
    assert not torch.isclose(none, said, atol=1e-5).all()
    assert not torch.isclose(followed, said, atol=1e-5).all()


@pytest.mark.parametrize("model", [TRANSFORMER, UNET], ids=["transformer", "unet"])
@pytest.mark.parametrize("described", [LABELLED, CAPTIONED], ids=["class", "text"])
def test_costs_are_counted_without_running(model, described):
    objective = build("flow", described, model)
    measured = torch.utils.flop_counter.FlopCounterMode(display=False)
    batch = some_batch(4, described)
    with measured, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        objective.loss(objective.phases[0], batch, rng(batch), {}).total.backward()
    assert objective.flops_per_sample() == pytest.approx(measured.get_total_flops() / 4, rel=0.1)
    assert objective.activation_bytes_per_sample(4) > objective.activation_bytes_per_sample(2) > 1000
    assert objective.rows_per_sample() == (4 if model is TRANSFORMER else 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_teaches_two_classes_of_images(name):
    """One pattern for each class; what is drawn of a class is its pattern."""
    described = ImageDescription(1, 8, ("left", "top"))
    model = DiffusionTransformerModel(layers=2, width=32, heads=2, patch=2)
    objective = build_objective(recipe(OBJECTIVES[name], model), described)
    left, top = torch.full((2, 8, 8), -1.0)
    left[:, :4] = 1
    top[:4] = 1
    labels = torch.arange(32) % 2
    patterns = torch.stack([left, top])[:, None]
    images = patterns[labels] * torch.linspace(0.5, 1.0, 32).view(-1, 1, 1, 1)
    batch = ImageBatch(images, labels, None, torch.arange(32))
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    for step in range(200):
        loss = objective.loss(objective.phases[0], batch, rng(batch, step=step), {})
        (loss.total / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
    drawn = objective.sample(ImageRequest(labels=labels[:8], steps=20), Rng(0, 0, "sample", torch.arange(8)))
    agreement = torch.einsum("bchw,kchw->bk", drawn, patterns) / 64
    assert (agreement.gather(1, labels[:8, None]) > 0.3).all()
    assert (agreement.gather(1, 1 - labels[:8, None]).abs() < 0.3).all()

"""Diffusion: an image is noised to a random level, and the network says what is image in it and what is noise.

Each objective takes :class:`genscale.data.image_batch.ImageBatch` micro-batches and has one network named ``model``.
The loss of an image is the mean over its pixels, so that ``loss`` compares across resolutions; a total is the sum over
images. The families (flow matching, EDM, DDPM) differ in their noise levels: :mod:`genscale.objectives.noise_levels`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from genscale.data.description import ImageDescription
from genscale.data.image_batch import ImageBatch
from genscale.models.denoiser import build_denoiser
from genscale.models.initialise import initialise
from genscale.objectives.augmentation import AUGMENTATION_WIDTH, augment
from genscale.objectives.conditioning import Conditioning
from genscale.objectives.decoding import evaluating
from genscale.objectives.drawing import check, draw
from genscale.objectives.guidance import Condition, away_from, classifier_free
from genscale.objectives.image_request import ImageRequest, SamplerName
from genscale.objectives.network_cost import Cost, cost
from genscale.objectives.noise_levels import (
    DDPMNoise,
    EDMNoise,
    FlowNoise,
    NoiseLevel,
    NoiseSchedule,
    one_by_one,
    spread_out,
)
from genscale.objectives.objective import Denoising, Loss, Phase
from genscale.objectives.samplers import Denoiser
from genscale.objectives.uncertainty import UncertainDenoiser
from genscale.recipe.image_model import DiffusionTransformerModel, UNetModel
from genscale.recipe.image_objective import DDPMObjective, EDMObjective, FlowObjective
from genscale.recipe.objective import DiffusionObjective
from genscale.recipe.sampling import ImageSampling
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

_THIRDS = ("low", "middle", "high")


class Targets(NamedTuple):
    """What the criterion compares the answers with."""

    answer: Tensor
    """(batch, channels, height, width)."""
    weight: Tensor
    """(batch,) of the squared error."""
    third: Tensor
    """(batch,) int64: whether the noise is in the lowest, the middle or the highest third of what is learned."""


class _Diffusion(Denoising):
    """What the families share."""

    sampler: ClassVar[SamplerName]
    """What ``sampler: auto`` is."""

    def __init__(
        self, recipe: Recipe, options: DiffusionObjective, described: ImageDescription, schedule: NoiseSchedule
    ):
        super().__init__()
        assert isinstance(recipe.model, DiffusionTransformerModel | UNetModel)  # the recipe has seen to it
        self.shape, self.described, self.schedule = recipe.model, described, schedule
        self.conditioning = Conditioning.of(options.conditioning, options.condition_dropout, described)
        self.augmentation = options.augmentation
        if isinstance(recipe.sampling, ImageSampling):
            self._check_previews(recipe.sampling)
        network = self._build()
        initialise(network, recipe.seed)
        self.networks = nn.ModuleDict({"model": UncertainDenoiser(network) if options.learned_uncertainty else network})

    def _check_previews(self, sampling: ImageSampling) -> None:
        """Raise UserError where the recipe's samples cannot be drawn: before training, not at its first validation."""
        request = ImageRequest(
            labels=torch.zeros(1, dtype=torch.long) if self.conditioning.kind == "class" else None,
            captions=torch.zeros(1, 1, dtype=torch.long) if self.conditioning.kind == "text" else None,
            sampler=sampling.sampler,
            steps=sampling.steps,
            guidance=sampling.guidance,
            truncation=sampling.truncation,
        )
        try:
            check(request, 1, self.image_shape)
            self.conditioning.check(request)
        except UserError as error:
            raise UserError(f"sampling.{error}") from None
        self.schedule.sampled(request.steps)

    def _build(self) -> nn.Module:
        return build_denoiser(self.shape, self.described, self.conditioning.kind, self._augmentation_width)

    @property
    def denoiser(self) -> nn.Module:
        """The network that samples are drawn with, without what helped to train it."""
        network = self.networks["model"]
        return network.network if isinstance(network, UncertainDenoiser) else network

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.described.channels, self.described.resolution, self.described.resolution

    @property
    def _augmentation_width(self) -> int:
        """Numbers that tell the network how an image was changed, so that it does not learn to draw such images."""
        told = self.augmentation is not None and not self.augmentation.leaky
        return AUGMENTATION_WIDTH if told else 0

    # ------------------------------------------------------------------------------------------------- training

    def weight(self, phase: Phase, batch: ImageBatch) -> Tensor:
        return torch.tensor(len(batch), device=batch.images.device)

    def prepare(self, batch: ImageBatch, rng: Rng, training: bool = True) -> tuple[dict[str, Any], Targets]:
        """Noise the images. Only in training are they augmented, and conditions left out."""
        images, changes = batch.images, None
        condition = self.conditioning.condition(batch.labels, batch.captions)
        if training:
            if self.augmentation is not None:
                images, changes = augment(images, rng, self.augmentation, self.augmentation.probability)
            dropped = rng.uniform("condition") < self.conditioning.dropout
            condition = self.conditioning.left_out(condition, dropped)
        uniform = rng.spread("time")
        levels = self.schedule.learned(uniform)
        here = spread_out(levels, images)
        noise = rng.normal("noise", tuple(images.shape[1:])).to(images)
        inputs = self._inputs(here.scale * here.mix(images, noise), levels.told.to(images), condition, changes)
        targets = Targets(
            here.answer(images, noise),
            self.schedule.weight(levels).to(images),
            (uniform * len(_THIRDS)).long(),
        )
        return inputs, targets

    def _inputs(self, x: Tensor, told: Tensor, condition: Condition, changes: Tensor | None = None) -> dict[str, Any]:
        """The network's keyword arguments; ``told`` is (batch,)."""
        inputs = {"x": x, "noise_level": told}
        if condition.labels is not None:
            inputs["labels"] = condition.labels
        if condition.captions is not None:
            inputs["captions"] = condition.captions
        if self._augmentation_width:
            inputs["augmentation"] = x.new_zeros(len(x), self._augmentation_width) if changes is None else changes
        return inputs

    def criterion(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Targets, training: bool = True) -> Loss:
        """The weighted squared error. With a learned uncertainty u what is trained is error / exp(u) + u (Karras et al.
        2024, section 2.2): then no noise level's gradient outweighs another's."""
        answer, uncertainty = outputs if isinstance(outputs, tuple) else (outputs, None)
        squared = (answer.to(targets.answer.dtype) - targets.answer).square()
        errors = squared.flatten(1).mean(dim=1) * targets.weight  # (batch,)
        number = torch.tensor(len(errors), device=errors.device)
        metrics = {"loss": (errors.sum(), number)}
        if training:
            total = errors if uncertainty is None else errors / uncertainty.exp() + uncertainty
            return Loss(total.sum(), metrics)
        for third, name in enumerate(_THIRDS):
            inside = targets.third == third
            metrics[f"loss_{name}_noise"] = ((errors * inside).sum(), inside.sum())
        return Loss(errors.sum(), metrics)

    def validate(self, batch: ImageBatch, rng: Rng) -> Loss:
        inputs, targets = self.prepare(batch, rng, training=False)
        return self.score(inputs, targets, training=False)

    def scores(self, means: dict[str, Tensor]) -> dict[str, float]:
        """Without the thirds that no held-out image fell into, where there are only a few."""
        scores = super().scores(means)
        return {name: score for name, score in scores.items() if name == "loss" or score == score}

    # ------------------------------------------------------------------------------------------------- sampling

    def sample(self, request: ImageRequest, rng: Rng) -> Tensor:
        """Draw images: (batch, channels, height, width) float32.

        Raises:
            UserError: where the request asks for what this model cannot do.
        """
        number = len(rng.positions)
        check(request, number, self.image_shape)
        self.conditioning.check(request)
        if request.sampler == "auto":
            request = replace(request, sampler=self.sampler)
        levels = one_by_one(self.schedule.sampled(request.steps))
        guide = None if request.guidance == 1 else self._guide(request)
        with ExitStack() as stack:
            device = stack.enter_context(evaluating(self.networks["model"]))
            condition = self._condition(request, number, device)

            def expected(x: Tensor, step: int, condition: Condition) -> Tensor:
                return self._expected(x, levels[step], condition)

            def plain(x: Tensor, step: int) -> Tensor:
                return expected(x, step, condition)

            guided: Denoiser | None = None
            if guide is not None:
                stack.enter_context(evaluating(guide.networks["model"]))
                known = guide._condition(request, number, device)
                guided = away_from(plain, lambda x, step: guide._expected(x, levels[step], known), request.guidance)
            elif request.guidance != 1:
                nothing = self.conditioning.nothing(number, device)
                guided = classifier_free(expected, condition, nothing, request.guidance)
            return draw(plain, guided, levels, request, self.image_shape, rng, device)

    def _expected(self, x: Tensor, level: NoiseLevel[float], condition: Condition) -> Tensor:
        """The image that the network expects in x, (batch, channels, height, width), at a noise level."""
        outputs = self.networks["model"](**self._inputs(level.scale * x, x.new_full((len(x),), level.told), condition))
        answer = outputs[0] if isinstance(outputs, tuple) else outputs
        return level.image(x, answer.to(x.dtype))

    def _condition(self, request: ImageRequest, number: int, device: torch.device) -> Condition:
        """What the request says of its images, as far as this network is told it."""
        labels = None if request.labels is None else request.labels.to(device)
        captions = None if request.captions is None else request.captions.to(device)
        given = self.conditioning.condition(labels, captions)
        nothing = self.conditioning.nothing(number, device)
        return Condition(*(none if one is None else one for one, none in zip(given, nothing, strict=True)))

    def _guide(self, request: ImageRequest) -> _Diffusion | None:
        """The request's guide, where it has one; raises UserError when it learned something else."""
        guide = request.guide
        if guide is None:
            return None
        if not isinstance(guide, _Diffusion) or guide.image_shape != self.image_shape:
            raise UserError("guide: expected a diffusion model that draws images of the same size and channels")
        ours, theirs = (objective.schedule.sampled(request.steps) for objective in (self, guide))
        if not (torch.equal(theirs.alpha, ours.alpha) and torch.equal(theirs.sigma, ours.sigma)):
            raise UserError("guide: it learned other noise levels; expected a model of the same objective and options")
        return guide

    # ----------------------------------------------------------------------------------------------------- cost

    @cached_property
    def _cost(self) -> Cost:
        """Of one image in the network."""

        def one() -> dict[str, Any]:
            x = torch.zeros(1, *self.image_shape)
            return self._inputs(x, torch.zeros(1), self.conditioning.nothing(1, x.device))

        return cost(self._build, one)

    def flops_per_sample(self) -> float:
        """Forward and backward, which costs twice as much."""
        return 3 * self._cost.flops

    def activation_bytes_per_sample(self, element: int) -> int:
        return self._cost.kept_elements * element + self._cost.kept_bytes

    def rows_per_sample(self) -> int:
        side = self.described.resolution
        if isinstance(self.shape, DiffusionTransformerModel):
            side //= self.shape.patch
        return max(1, side**2)


class Flow(_Diffusion):
    """Flow matching: the network gives the velocity from image to noise."""

    sampler: ClassVar[SamplerName] = "heun"

    def __init__(self, recipe: Recipe, described: ImageDescription):
        assert isinstance(recipe.objective, FlowObjective)
        super().__init__(recipe, recipe.objective, described, FlowNoise(recipe.objective))


class EDM(_Diffusion):
    """Preconditioned denoising under noise of any strength."""

    sampler: ClassVar[SamplerName] = "heun"

    def __init__(self, recipe: Recipe, described: ImageDescription):
        assert isinstance(recipe.objective, EDMObjective)
        super().__init__(recipe, recipe.objective, described, EDMNoise(recipe.objective))


class DDPM(_Diffusion):
    """Denoising diffusion in discrete steps: the network gives the noise, the image, or v."""

    sampler: ClassVar[SamplerName] = "dpm_solver_2m"

    def __init__(self, recipe: Recipe, described: ImageDescription):
        assert isinstance(recipe.objective, DDPMObjective)
        super().__init__(recipe, recipe.objective, described, DDPMNoise(recipe.objective))

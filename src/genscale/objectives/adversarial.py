"""Adversarial training: a generator and a discriminator learn against each other, each in phases of its own.

No statistic of a batch enters a loss: losses and penalties are sums over images, so that accumulation and any number of
ranks leave the gradient as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch
from torch import Tensor, nn

from genscale.data.description import ImageDescription
from genscale.data.image_batch import ImageBatch
from genscale.models.initialise import initialise
from genscale.models.players import Role, build_player
from genscale.objectives.adaptive import AdaptiveProbability, overfitting_signs
from genscale.objectives.adversarial_losses import (
    discriminator_loss,
    generator_loss,
    path_lengths,
    squared_gradient,
)
from genscale.objectives.augmentation import augment
from genscale.objectives.balance import Balance, spread
from genscale.objectives.decoding import evaluating
from genscale.objectives.image_request import ImageRequest
from genscale.objectives.moment_distance import MomentSpace, folds, squared_distance
from genscale.objectives.network_cost import Cost, cost
from genscale.objectives.objective import Loss, Objective, Phase
from genscale.recipe.image_model import DCGANModel, GANModel
from genscale.recipe.image_objective import AdversarialObjective
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

_PATH_DECAY = 0.01
"""How fast the mean path length follows, at each step that measures one (Karras et al. 2020, appendix B)."""


class Adversarial(Objective):
    """The two-player game in four forms, with the penalties that make it converge.

    Each phase draws latents of its own. Penalties are taken at what the discriminator sees: augmented images. A
    generated image is of the class of the real one in its place, so that a pair differs in nothing but who made it.
    """

    sampled = ("generator",)
    path_length: Tensor
    """Running mean of the path length, which the penalty pulls each length to."""

    def __init__(self, recipe: Recipe, described: ImageDescription):
        """Raises UserError where classes are asked for that the data does not have."""
        super().__init__()
        assert isinstance(recipe.objective, AdversarialObjective)
        assert isinstance(recipe.model, GANModel | DCGANModel)
        self.options, self.shape, self.described = recipe.objective, recipe.model, described
        if self.options.conditioning == "class" and not described.classes:
            raise UserError("objective.conditioning: 'class' needs labels, and the data has none; use 'none' or 'auto'")
        self.conditional = bool(described.classes) and self.options.conditioning != "none"
        self.networks = nn.ModuleDict({role: self._player(role) for role in get_args(Role)})
        for name, network in self.networks.items():
            initialise(network, recipe.seed, prefix=name)
        self.phases = _phases(self.options)
        self.relative = self.options.loss in ("relativistic", "wasserstein")
        """Whether the loss sees differences of logits only."""
        self.balance = Balance(signs=self.options.loss != "wasserstein")
        self.register_buffer("path_length", torch.tensor(0.0))
        changes = self.options.augmentation
        self.adaptive = AdaptiveProbability(changes) if changes and changes.target else None
        self._space = MomentSpace(described.channels, described.resolution)

    def _player(self, role: Role) -> nn.Module:
        return build_player(role, self.shape, self.described, self.conditional)

    def weight(self, phase: Phase, batch: ImageBatch) -> Tensor:
        return torch.tensor(len(batch), device=batch.images.device)

    def scalars(self, progress: float) -> dict[str, float]:
        final = self.options.penalty_final
        factor = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        return {"r1": self.options.r1 * factor, "r2": self.options.r2 * factor}

    def loss(self, phase: Phase, batch: ImageBatch, rng: Rng, scalars: dict[str, float]) -> Loss:
        playing = not phase.name.endswith("_penalty")
        # A penalty that is taken every n-th step weighs n times as much (Karras et al. 2020, appendix B).
        penalty = phase.every if phase.differentiates_twice else 0
        with _precise(batch.images.device) if penalty else nullcontext():
            if phase.trains == "discriminator":
                return self._discriminator_loss(batch, rng, scalars, playing, penalty)
            return self._generator_loss(batch, rng, playing, penalty)

    def _discriminator_loss(
        self, batch: ImageBatch, rng: Rng, scalars: dict[str, float], playing: bool, penalty: int
    ) -> Loss:
        """``playing``: with the game itself; ``penalty``: the weight of the penalties, 0 without them."""
        options, labels, judge = self.options, self._labels(batch), self.networks["discriminator"]
        real = self._seen(batch.images, rng).detach()  # not the batch's own tensor, which may be asked for gradients
        shown = {"r1": real}
        if playing or options.r2 or options.gradient_penalty:
            with torch.no_grad():
                shown["r2"] = self._seen(self._draw(batch, rng), rng, generated=True)
        penalties = torch.zeros(len(batch), device=real.device)
        logits, measured = {}, {}
        for name, images in shown.items():
            penalised = penalty > 0 and getattr(options, name) > 0
            if playing or penalised:
                logits[name] = judge(images.requires_grad_(penalised), labels)
            if penalised:
                measured[name] = squared_gradient(logits[name], images)
                penalties = penalties + penalty * scalars[name] / 2 * measured[name]
        if penalty and options.gradient_penalty:
            share = rng.uniform("between")[:, None, None, None].to(real.dtype)
            between = torch.lerp(real.detach(), shown["r2"].detach(), share).requires_grad_()
            norm = (squared_gradient(judge(between, labels), between) + 1e-12).sqrt()
            measured["gradient_norm_between"] = norm
            penalties = penalties + penalty * options.gradient_penalty * (norm - 1).square()
        if not playing:
            return _sums(penalties, {"loss": penalties, **measured})
        real_logits, fake_logits = logits["r1"], logits["r2"]
        losses = discriminator_loss(options.loss, real_logits, fake_logits)
        signs = overfitting_signs(real_logits, fake_logits, self.relative)
        measured |= {"loss": losses, "real_logit": real_logits, "fake_logit": fake_logits, "sign": signs}
        return _sums(losses + penalties, measured)

    def _generator_loss(self, batch: ImageBatch, rng: Rng, playing: bool, penalty: int) -> Loss:
        """``playing``: with the game itself; ``penalty``: the weight of the path-length penalty, 0 without it."""
        labels, judge = self._labels(batch), self.networks["discriminator"]
        latents = self._latents(batch, rng).requires_grad_(penalty > 0)
        fake = self.networks["generator"](latents, labels)
        total, measured = torch.zeros(len(batch), device=fake.device), {}
        if penalty:
            noise = rng.normal("path", tuple(fake.shape[1:])).to(fake.dtype)
            measured["path_length"] = path_lengths(fake, latents, noise)
            deviations = (measured["path_length"] - self.path_length).square()
            total = measured["loss"] = penalty * self.options.path_length * deviations
        if not playing:
            return _sums(total, measured)
        with torch.no_grad():
            paired = self.options.loss == "relativistic"
            real_logits = judge(self._seen(batch.images, rng), labels) if paired else None
        fake_logits = judge(self._seen(fake, rng, generated=True), labels)
        losses = generator_loss(self.options.loss, real_logits, fake_logits)
        loss = _sums(losses + total, {**measured, "loss": losses, "fake_logit": fake_logits})
        return Loss(loss.total, {**loss.metrics, "diversity": spread(fake.detach(), batch.images, batch.labels)})

    def observe(self, measured: dict[str, float], samples: int) -> None:
        sign = measured.get("discriminator_sign", math.nan)
        real, fake = (measured.get(f"discriminator_{side}_logit", math.nan) for side in ("real", "fake"))
        diversity = measured.get("generator_diversity", math.nan)
        self.balance.observe(samples, real_logit=real, gap=real - fake, sign=sign, diversity=diversity)
        if self.adaptive is not None:
            self.adaptive.update(sign, samples)
        for phase in self.phases:
            length = measured.get(f"{phase.name}_path_length", math.nan)
            if math.isfinite(length):
                self.path_length += _PATH_DECAY * (length - self.path_length)

    def concerns(self, measured: dict[str, float]) -> dict[str, str]:
        return self.balance.concerns()

    def _latents(self, batch: ImageBatch, rng: Rng) -> Tensor:
        """(batch, latent)."""
        return rng.normal("latent", (self.shape.latent,)).to(batch.images.dtype)

    def _draw(self, batch: ImageBatch, rng: Rng) -> Tensor:
        """A generated image for each of the batch, of the same class."""
        return self.networks["generator"](self._latents(batch, rng), self._labels(batch))

    def _labels(self, batch: ImageBatch) -> Tensor | None:
        """(batch,) int64 for the networks: a class that is not known is the one after the last."""
        if not self.conditional:
            return None
        unknown = len(self.described.classes)
        if batch.labels is None:
            return torch.full((len(batch),), unknown, device=batch.images.device)
        return batch.labels.where(batch.labels >= 0, unknown)

    def _seen(self, images: Tensor, rng: Rng, generated: bool = False) -> Tensor:
        """Images as the discriminator sees them."""
        changes = self.options.augmentation
        if changes is None or (changes.leaky and generated):
            return images
        probability = changes.probability if self.adaptive is None else self.adaptive.probability
        return augment(images, rng, changes, probability)[0]

    # What it has come to

    def validate(self, batch: ImageBatch, rng: Rng) -> Loss:
        """Sums of which :meth:`scores` makes the distance to held-out images and the discriminator's gap on them."""
        labels, judge = self._labels(batch), self.networks["discriminator"]
        fake = self._draw(batch, rng)
        loss = _sums(
            torch.zeros(len(batch), device=fake.device),
            {
                "real_logit": judge(self._seen(batch.images, rng), labels),
                "fake_logit": judge(self._seen(fake, rng, generated=True), labels),
            },
        )
        fold, number = folds(rng), self.weight(self.phases[0], batch)
        moments = {
            "folds": (fold.sum(0), number),
            "real_moments": (fold.T @ self._space.features(batch.images), number),
            "fake_moments": (fold.T @ self._space.features(fake), number),
        }
        return Loss(loss.total, {**loss.metrics, **moments, "diversity": spread(fake, batch.images, batch.labels)})

    def scores(self, means: dict[str, Tensor]) -> dict[str, float]:
        """``loss`` is the distance of generated from held-out images (:mod:`genscale.objectives.moment_distance`).

        ``discriminator_gap`` is how far the discriminator's mean logit at images that it was trained on lately is above
        that at held-out images: 0 without overfitting. ``overfitting`` is the same in units of its distance to
        generated images: 1 when held-out images look no more real than those (r_v of Karras et al. 2020, equation 1).
        """
        scores = {name: means[name].item() for name in ("real_logit", "fake_logit", "diversity")}
        scores["loss"] = squared_distance(means["real_moments"], means["fake_moments"], means["folds"])
        if self.balance.seen:
            trained = self.balance.real_logit.item()
            gap = scores["discriminator_gap"] = trained - scores["real_logit"]
            scores["overfitting"] = gap / (trained - scores["fake_logit"] or math.nan)
        return scores

    def sample(self, request: ImageRequest, rng: Rng) -> Tensor:
        """(batch, channels, resolution, resolution); of a random class where none is asked for.

        Raises:
            UserError: asked for what a GAN cannot do, or for a class that there is not.
        """
        if request.image is not None or request.mask is not None:
            raise UserError("an image to start from needs a diffusion run, not a GAN; give latents, or leave it out")
        if request.captions is not None:
            raise UserError("this run is a GAN, which knows no captions; give labels, or leave them out")
        latents = request.latents
        if latents is None:
            latents = rng.normal("latent", (self.shape.latent,))
        elif latents.shape != (len(rng.positions), self.shape.latent):
            expected = f"({len(rng.positions)}, {self.shape.latent})"
            raise UserError(f"latents: expected the shape {expected}, not {tuple(latents.shape)}")
        labels = self._asked_labels(request, rng)
        with evaluating(self.networks["generator"]) as device:
            # Latents are around 0, so that shrinking them is truncation towards their mean (Brock et al. 2019).
            latents = request.truncation * latents.to(device)
            return self.networks["generator"](latents, None if labels is None else labels.to(device))

    def _asked_labels(self, request: ImageRequest, rng: Rng) -> Tensor | None:
        """(batch,) int64, a class for each image; None where the networks know none."""
        classes, labels = len(self.described.classes), request.labels
        if not self.conditional:
            if labels is not None and (labels >= 0).any():
                raise UserError("this run knows no classes (objective.conditioning); leave labels out")
            return None
        any_class = rng.integers("label", classes)
        if labels is None:
            return any_class
        if labels.max() >= classes:
            raise UserError(f"label {labels.max().item()}: the classes are numbered from 0 to {classes - 1}")
        return torch.where(labels < 0, any_class.to(labels.device), labels)

    # What it costs

    @functools.cached_property
    def _costs(self) -> dict[str, Cost]:
        """Of one forward of each network, for one image."""
        size, described = self.shape.latent, self.described

        def labels() -> Tensor:
            return torch.zeros(1, dtype=torch.long)

        channels, resolution = described.channels, described.resolution
        inputs: dict[Role, Callable[[], dict[str, Tensor]]] = {
            "generator": lambda: {"latents": torch.zeros(1, size), "labels": labels()},
            "discriminator": lambda: {"images": torch.zeros(1, channels, resolution, resolution), "labels": labels()},
        }
        return {role: cost(functools.partial(self._player, role), given) for role, given in inputs.items()}

    def flops_per_sample(self) -> float:
        """A backward is twice a forward; a penalty adds one for the gradient, and two for that one's own backward."""
        options, lazy = self.options, self.options.lazy
        generator, discriminator = (self._costs[name].flops for name in ("generator", "discriminator"))
        squared, between = (options.r1 > 0) + (options.r2 > 0), options.gradient_penalty > 0
        paths = options.path_length > 0
        total = generator + 2 * 3 * discriminator  # drawn; real and generated images judged, and learned from
        total += 3 * generator + (2 + (options.loss == "relativistic")) * discriminator
        if lazy == 1:
            return total + (3 * squared + 6 * between) * discriminator + 3 * paths * generator
        drawn = options.r2 > 0 or between
        return total + (6 * (squared + between) * discriminator + (drawn + 6 * paths) * generator) / lazy

    def activation_bytes_per_sample(self, element: int) -> int:
        """In the larger of the players' phases; what is kept for a penalty is counted as twice as much."""
        options = self.options
        generator, discriminator = (self._costs[name] for name in ("generator", "discriminator"))
        judged = 2 + (options.r1 > 0) + (options.r2 > 0) + 2 * (options.gradient_penalty > 0)
        drawn = 1 + (options.path_length > 0)
        elements = max(
            judged * discriminator.kept_elements, drawn * generator.kept_elements + discriminator.kept_elements
        )
        return element * elements + judged * discriminator.kept_bytes + drawn * generator.kept_bytes

    def rows_per_sample(self) -> int:
        return self.described.resolution**2


def _phases(options: AdversarialObjective) -> tuple[Phase, ...]:
    """A phase for each player; with lazy penalties, each player that has some is followed by a phase of theirs."""
    phases = []
    for network, penalised in (
        ("discriminator", bool(options.r1 or options.r2 or options.gradient_penalty)),
        ("generator", bool(options.path_length)),
    ):
        at_once = penalised and options.lazy == 1
        phases.append(Phase(network, trains=network, differentiates_twice=at_once, competes=True))
        if penalised and not at_once:
            penalty = f"{network}_penalty"
            phases.append(Phase(penalty, network, every=options.lazy, differentiates_twice=True, competes=True))
    return tuple(phases)


def _precise(device: torch.device) -> AbstractContextManager[object]:
    """What penalties are computed in: as the rest is, but float32 in place of fp16.

    No loss scale reaches a gradient within a loss, and in fp16 it would vanish. bf16 loses nothing: the gradient of R1
    and R2 has a cosine of 0.9999 with float64's, as that of the game itself has.
    """
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) is torch.float16
    return torch.autocast(device.type, enabled=False) if half else nullcontext()


def _sums(total: Tensor, measured: dict[str, Tensor]) -> Loss:
    """From numbers for each image, (batch,)."""
    number = torch.tensor(len(total), device=total.device)
    return Loss(total.sum(), {name: (each.detach().sum(), number) for name, each in measured.items()})

"""What the benchmarks of adversarial training share: the shortest loop that plays the game for so many CPU-seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genscale.data.description import ImageDescription
from genscale.data.image_batch import ImageBatch
from genscale.objectives.adversarial import Adversarial
from genscale.objectives.image_request import ImageRequest
from genscale.recipe.image_data import ImageData
from genscale.recipe.image_model import DCGANModel, GANModel
from genscale.recipe.image_objective import AdversarialObjective
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Training
from genscale.runtime.randomness import Rng, generator
from genscale.training.average import WeightAverage


class Images(NamedTuple):
    """Real images of one split."""

    pixels: Tensor
    """(pictures, resolution, resolution) uint8 grey."""
    channels: Tensor
    """(images, channels) the picture that is in each channel of an image."""
    labels: Tensor | None = None
    """(images,) int64."""

    def batch(self, numbers: Tensor) -> ImageBatch:
        """Those images, float32 from -1 to 1."""
        images = self.pixels[self.channels[numbers]].float() / 127.5 - 1
        return ImageBatch(images, None if self.labels is None else self.labels[numbers], None, numbers)


class Game:
    """A generator and a discriminator with their optimizers, and the average of the generator.

    Args:
        held_out: images that validation looks at.
        options: of the objective.
    """

    def __init__(
        self,
        training: Images,
        held_out: Images,
        model: GANModel | DCGANModel,
        options: AdversarialObjective,
        *,
        batch: int = 64,
        learning_rate: float = 2e-3,
        beta2: float = 0.99,
        half_life: int = 5000,
        seed: int = 0,
    ):
        self.training, self.held_out, self.batch, self.seed = training, held_out, batch, seed
        channels, resolution = training.channels.shape[1], training.pixels.shape[1]
        classes = 0 if training.labels is None else int(training.labels.max()) + 1
        described = ImageDescription(channels, resolution, tuple(map(str, range(classes))))
        budget = Training(budget="1 step")  # not looked at: the clock is that of the CPU
        recipe = Recipe(data=ImageData(), model=model, objective=options, training=budget, seed=seed)
        self.objective = Adversarial(recipe, described)
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), learning_rate, (0.0, beta2), weight_decay=0.0, fused=True)
            for name, network in self.objective.networks.items()
        }
        self.average = WeightAverage(self.objective.networks["generator"], half_life)
        self.step = 0

    def play(self) -> dict[str, float]:
        """One step: every phase that is due."""
        measured = {}
        objective, step = self.objective.train(), self.step
        for phase in objective.phases:
            if step % phase.every:
                continue
            for name, network in objective.networks.items():
                network.requires_grad_(name == phase.trains)
            source = generator(self.seed, step, "images")
            batch = self.training.batch(torch.randint(len(self.training.channels), (self.batch,), generator=source))
            rng = Rng(self.seed, step, phase.name, torch.arange(self.batch))
            loss = objective.loss(phase, batch, rng, objective.scalars(0.0))
            self.optimizers[phase.trains].zero_grad()
            (loss.total / self.batch).backward()
            self.optimizers[phase.trains].step()
            for name, (total, count) in loss.metrics.items():
                measured[f"{phase.name}_{name}"] = (total / count).item()
        objective.observe(measured, self.batch)
        self.average.update(self.batch)
        self.step += 1
        return measured

    @torch.no_grad()
    def scores(self, batch: int = 100) -> dict[str, float]:
        """Validation over all held-out images, with the averaged generator, as training does it."""
        means: dict[str, tuple[Tensor, Tensor]] = {}
        objective = self.objective.eval()
        with self.average.swapped():
            for start in range(0, len(self.held_out.channels), batch):
                numbers = torch.arange(start, min(start + batch, len(self.held_out.channels)))
                found = self.held_out.batch(numbers)
                rng = Rng(self.seed, 0, "validate", numbers)
                for name, (total, count) in objective.validate(found, rng).metrics.items():
                    before = means.get(name, (0.0, 0.0))
                    means[name] = before[0] + total.double(), before[1] + count.double()
        return objective.scores({name: total / count for name, (total, count) in means.items()})

    @torch.no_grad()
    def held_out_gap(self, batch: int = 500) -> dict[str, float]:
        """How far the discriminator's mean logit at all training images is above that at held-out ones, as it is now
        and without augmentation; ``relative`` is in units of its distance to images that the generator draws now."""
        judge, maker = (self.objective.eval().networks[name] for name in ("discriminator", "generator"))
        logits: dict[str, list[Tensor]] = {"training": [], "held out": [], "drawn": []}
        for name, images in (("training", self.training), ("held out", self.held_out)):
            for numbers in torch.arange(len(images.channels)).split(batch):
                found = images.batch(numbers)
                logits[name].append(judge(found.images, found.labels))
                if name == "held out":
                    latents = Rng(self.seed, 0, "gap", numbers).normal("latent", (self.objective.shape.latent,))
                    logits["drawn"].append(judge(maker(latents, found.labels), found.labels))
        means = {name: torch.cat(each).mean().item() for name, each in logits.items()}
        gap = means["training"] - means["held out"]
        return {"gap": gap, "relative": gap / (means["training"] - means["drawn"])}

    def draw(self, count: int, labels: Tensor | None = None, batch: int = 500) -> Tensor:
        """(count, channels, resolution, resolution) by the averaged generator."""
        drawn = []
        with self.average.swapped():
            for start in range(0, count, batch):
                numbers = torch.arange(start, min(start + batch, count))
                request = ImageRequest(labels=None if labels is None else labels[numbers])
                drawn.append(self.objective.sample(request, Rng(self.seed, 0, "sample", numbers)))
        return torch.cat(drawn)


def play_for(game: Game, seconds: float, every: float) -> Iterator[tuple[float, dict[str, float]]]:
    """Play for so many CPU-seconds, all threads together; what is done between does not count.

    Args:
        every: CPU-seconds between two yields.

    Yields:
        CPU-seconds so far, and the means of what was measured since the last time.
    """
    spent, steps, due = 0.0, 0, every
    sums: dict[str, float] = {}
    while spent < seconds:
        began = time.process_time()
        measured = game.play()
        spent += time.process_time() - began
        steps += 1
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + value
        if spent >= due or spent >= seconds:
            yield spent, {name: value / steps for name, value in sums.items()}
            sums, steps, due = {}, 0, spent + every

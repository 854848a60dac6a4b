"""Stacked-MNIST: how many of 1,000 modes each form of adversarial training reaches in equal CPU time.

    python benchmarks/stacked_mnist.py --mnist FOLDER --seconds 600

An image has a random digit in each of its three channels (Metz et al. 2017), so that the data has 1,000 equally likely
modes. The mode of a generated image is what a classifier of MNIST digits, trained here first, sees in its channels. The
published order (Huang et al. 2024, table 1) is relativistic with R1 and R2 first; with R1 alone both losses failed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from adversarial_loop import Game, Images, play_for
from mnist import read_idx

from genscale.evaluation.classifier import Classifier, publish_classifier
from genscale.evaluation.modes import Modes, modes, stacked_classes
from genscale.recipe.image_model import DCGANModel
from genscale.recipe.image_objective import AdversarialObjective
from genscale.runtime.randomness import generator

VARIANTS = {
    "relativistic, R1 + R2": {"loss": "relativistic", "r1": 1.0, "r2": 1.0},
    "non-saturating, R1 + R2": {"loss": "non_saturating", "r1": 1.0, "r2": 1.0},
    "relativistic, R1": {"loss": "relativistic", "r1": 1.0, "r2": 0.0},
    "non-saturating, R1": {"loss": "non_saturating", "r1": 1.0, "r2": 0.0},
}


class Digits:
    """What the classifier is trained on and scored by."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.pixels, self.labels = pixels, labels.numpy()

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, numbers: np.ndarray) -> torch.Tensor:
        return self.pixels[torch.as_tensor(numbers)][:, None].float() / 127.5 - 1


def stack(pixels: torch.Tensor, count: int, name: str) -> Images:
    return Images(pixels, torch.randint(len(pixels), (count, 3), generator=generator(0, name)))


@torch.no_grad()
def count_modes(game: Game, classifier: Classifier, samples: int) -> Modes:
    images = game.draw(samples).clamp(-1, 1)
    digits = torch.cat([classifier(part.flatten(0, 1)[:, None]).argmax(1) for part in images.split(500)])
    return modes(stacked_classes(digits.view(-1, 3).numpy()), 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="the folder of the idx files")
    parser.add_argument("--seconds", type=float, default=600, help="CPU-seconds for each variant, all threads together")
    parser.add_argument("--every", type=float, help="CPU-seconds between counts; by default a fifth of all")
    parser.add_argument("--samples", type=int, default=25_600, help="generated images in each count")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--classifier-images", type=int, default=180_000, help="seen by the classifier in training")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="channels of each level, finest first")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", help="a JSON file for the curves")
    options = parser.parse_args()

    train, test = read_idx(options.mnist, "train"), read_idx(options.mnist, "t10k")
    with tempfile.TemporaryDirectory() as folder:
        classifier, facts = publish_classifier(
            Path(folder), Digits(*train), Digits(*test), classes=10, data="mnist", device=torch.device("cpu"),
            images_seen=options.classifier_images,
        )  # fmt: skip
    print(f"classifier of digits: accuracy {facts['accuracy']:.4f} on the test split")
    training, held_out = stack(train[0], 128_000, "stacked"), stack(test[0], 1000, "stacked test")
    widths = tuple(options.widths)
    model = DCGANModel(generator=widths[::-1], discriminator=widths)
    curves: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name in options.only:
            game = Game(
                training, held_out, model, AdversarialObjective(**VARIANTS[name]),
                learning_rate=options.learning_rate, seed=seed,
            )  # fmt: skip
            curve = curves.setdefault(f"{name}, seed {seed}", [])

            for spent, measured in play_for(game, options.seconds, options.every or options.seconds / 5):
                found = count_modes(game, classifier, options.samples)
                curve.append(
                    {
                        "cpu_seconds": spent,
                        "images": game.step * game.batch,
                        "modes": found.covered,
                        "divergence": found.divergence,
                        "diversity": measured["generator_diversity"],
                        "sign": measured["discriminator_sign"],
                    }
                )
                print(json.dumps({"variant": name, "seed": seed, **curve[-1]}), flush=True)
            for concern in game.objective.concerns({}).values():
                print(f"{name}: {concern}")
    print("\n| variant | seed | images | CPU-seconds | modes of 1,000 | KL |\n|---|---|---|---|---|---|")
    for name, curve in curves.items():
        last, (variant, seed) = curve[-1], name.rsplit(", seed ", 1)
        figures = f"{last['images']:,} | {last['cpu_seconds']:.0f} | {last['modes']:.0f} | {last['divergence']:.3f}"
        print(f"| {variant} | {seed} | {figures} |")
    if options.out:
        Path(options.out).write_text(json.dumps(curves, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Few images: what adaptive augmentation (ADA) does to the discriminator's gap on held-out images.

    python benchmarks/adaptive_augmentation.py --images FOLDER --seconds 900

The same pair learns from 1,000 images in MNIST's form, once as they are and once with augmentation whose probability
follows the discriminator's overfitting. The gap is the mean logit of training images above that of held-out ones;
relative, in units of the distance between training and generated images, it is 0 without overfitting, and 1 when
held-out images look no more real than generated ones (Karras et al. 2020, equation 1). Both are scored on the same
held-out images.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from adversarial_loop import Game, Images, play_for
from mnist import read_idx

from genscale.recipe.image_model import DCGANModel
from genscale.recipe.image_objective import AdversarialObjective, Augmentation

VARIANTS = ("none", "fixed", "adaptive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="the folder of the idx files")
    parser.add_argument("--count", type=int, default=1000, help="images to learn from")
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=900, help="CPU-seconds for each variant, all threads together")
    parser.add_argument("--every", type=float, help="CPU-seconds between scores; by default a tenth of all")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=["none", "adaptive"])
    parser.add_argument("--loss", default="non_saturating", help="objective.loss")
    parser.add_argument("--r1", type=float, default=1.0)
    parser.add_argument("--r2", type=float, default=0.0)
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--speed", default="20k samples", help="in which the probability can go from 0 to 1")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64], help="channels of each level, finest first")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="a JSON file for the curves")
    options = parser.parse_args()

    pixels, labels = read_idx(options.images, "train")
    held = read_idx(options.images, "t10k")
    training = Images(pixels, torch.arange(options.count)[:, None], labels)
    held_out = Images(held[0], torch.arange(options.held_out)[:, None], held[1])
    widths = tuple(options.widths)
    model = DCGANModel(generator=widths[::-1], discriminator=widths)
    changes = {"rotate": 15.0, "translate": 0.125, "scale": 0.1, "colour": 0.5, "cutout": 0.4}
    curves: dict[str, list[dict[str, float]]] = {}
    for seed, variant in itertools.product(options.seeds, options.only):
        augmentation = {
            "none": None,
            "fixed": Augmentation(probability=0.5, **changes),
            "adaptive": Augmentation(probability=0.0, target=options.target, speed=options.speed, **changes),
        }[variant]
        game = Game(
            training, held_out, model,
            AdversarialObjective(loss=options.loss, r1=options.r1, r2=options.r2, augmentation=augmentation),
            learning_rate=options.learning_rate, seed=seed,
        )  # fmt: skip
        curve = curves[f"{variant}, seed {seed}"] = []
        for spent, measured in play_for(game, options.seconds, options.every or options.seconds / 10):
            adaptive = game.objective.adaptive
            curve.append(
                {
                    "cpu_seconds": spent,
                    "images": game.step * game.batch,
                    "sign": measured["discriminator_sign"],
                    "probability": 0.0 if adaptive is None else adaptive.probability.item(),
                    "distance": game.scores()["loss"],
                    **game.held_out_gap(),
                }
            )
            print(json.dumps({"variant": variant, "seed": seed, **curve[-1]}), flush=True)
    print("\n| augmentation | images seen | gap, logits | gap, relative | sign of real | probability | distance |")
    print("|---|---|---|---|---|---|---|")
    for variant, curve in curves.items():
        for row in curve:
            names = ("gap", "relative", "sign", "probability", "distance")
            print(f"| {variant} | {row['images']:,} | {' | '.join(f'{row[name]:.3g}' for name in names)} |")
    if options.out:
        Path(options.out).write_text(json.dumps(curves, indent=2) + "\n")


if __name__ == "__main__":
    main()

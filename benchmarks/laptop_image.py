"""Which image recipe a laptop should start from: what each learns of Fashion-MNIST in ten CPU-minutes.

    OMP_NUM_THREADS=1 python benchmarks/laptop_image.py --seconds 600

Ten CPU-minutes are five minutes on two cores. Each candidate is trained by ``genscale.train`` on as many images as fit,
by the time of its first steps, and is then evaluated as ``genscale evaluate`` does it; drawing is not in its time. The
kernel distance decides, because it is unbiased at any number of images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import genscale
from genscale.recipe.schema import Recipe
from genscale.training import loop

DIFFUSION, GAN = "fashion-mnist-diffusion", "fashion-mnist-gan"
SLOWER = "training.optimizer.learning_rate=0.001"
CANDIDATES: dict[str, tuple[str, ...]] = {
    "UNet of width 32, flow": (DIFFUSION,),
    "UNet of width 64, flow": (DIFFUSION, "model.width=64", "model.head_width=64"),
    "UNet of width 32, EDM": (DIFFUSION, "objective={kind: edm, augmentation: {flip: true, probability: 0.5}}"),
    "diffusion transformer 6 x 192, patch 4, flow": (
        DIFFUSION,
        "model={kind: diffusion_transformer, layers: 6, width: 192, heads: 3, patch: 4}",
        SLOWER,
    ),
    "DCGAN pair": (GAN,),
    "residual pair (R3GAN)": (GAN, "model={kind: gan, generator: [96, 48, 24], discriminator: [24, 48, 96]}", SLOWER),
}
"""The recipe, and the overrides of it."""


def candidate(name: str, folder: Path, store: Path, budget: str) -> Recipe:
    recipe, *overrides = CANDIDATES[name]
    lies = (f"run={folder / 'run'}", f"data.store={store}", f"training.budget={budget}", "layout.precision=fp32")
    return genscale.load_recipe(recipe, [*overrides, *lies])


def seconds_per_image(name: str, store: Path, steps: int) -> float:
    """CPU-seconds, the median of the steps."""
    spent = []
    original = loop.train_step

    def timed(job: Any, step: int) -> Any:
        began = time.process_time()
        done = original(job, step)
        spent.append((time.process_time() - began) / job.plan.batch)
        return done

    loop.train_step = timed
    with TemporaryDirectory() as folder:
        genscale.train(candidate(name, Path(folder), store, f"{steps} steps"), show_progress=False)
    loop.train_step = original
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="CPU-seconds of training, all threads together")
    parser.add_argument("--count", type=int, default=1000, help="images to draw and compare")
    parser.add_argument("--only", nargs="*", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--steps", type=int, default=12, help="steps that tell how many images fit")
    parser.add_argument("--out", type=Path, default=Path("laptop"), help="folder of the store and the runs")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        per_image = seconds_per_image(name, options.out / "store", options.steps)
        images = int(options.seconds / per_image)
        folder = options.out / name.replace(" ", "-").replace(",", "")
        began = time.process_time()
        run = genscale.train(candidate(name, folder, options.out / "store", f"{images} images"), show_progress=False)
        spent = time.process_time() - began
        scores = genscale.evaluate(run, count=options.count)
        rows.append({"candidate": name, "images": images, "cpu_seconds": spent, **scores})
        print(json.dumps(rows[-1]), flush=True)
    number = f"classifier, N={options.count}"
    print("\n| recipe | images | CPU-minutes | kernel distance | Fréchet | recall | coverage | classes as asked |")
    print("|---" * 8 + "|")
    for row in sorted(rows, key=lambda row: row[f"kernel_distance({number})"]):
        kernel, error = row[f"kernel_distance({number})"], row[f"kernel_distance_standard_error({number})"]
        others = (row[f"{name}({number})"] for name in ("frechet_distance", "recall", "coverage", "label_accuracy"))
        figures = " | ".join(f"{value:.3g}" for value in others)
        minutes = row["cpu_seconds"] / 60
        print(f"| {row['candidate']} | {row['images']:,} | {minutes:.1f} | {kernel:.4f} ± {error:.4f} | {figures} |")


if __name__ == "__main__":
    main()

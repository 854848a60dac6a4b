"""genscale itself: ``train()`` with everything that it always does (guard, metrics, checkpoints, run directory)."""

from __future__ import annotations

import json
import shutil
from typing import Any

from figures import Figures
from image_shapes import DIFFUSION_STEPS, EMA_HALF_LIFE, SHAPES, GANShape, UNetShape, arguments

from genscale.recipe.load import recipe_from_mapping
from genscale.training import loop
from genscale.training.run import train


def networks(shape: UNetShape | GANShape) -> dict[str, Any]:
    """The recipe's ``model`` and ``objective``."""
    if isinstance(shape, GANShape):
        return {
            "model": {
                "kind": shape.kind,
                "latent": shape.latent,
                "generator": shape.generator,
                "discriminator": shape.discriminator,
            },
            "objective": {
                "kind": "adversarial",
                "loss": "relativistic",
                "conditioning": "none",
                "r1": shape.penalty,
                "r2": shape.penalty,
            },
        }
    return {
        "model": {
            "kind": "unet",
            "width": shape.width,
            "multipliers": shape.multipliers,
            "blocks": shape.blocks,
            "attention": shape.attention,
            "head_width": shape.head_width,
        },
        "objective": {"kind": "ddpm", "conditioning": "none", "steps": DIFFUSION_STEPS},
    }


def main() -> None:
    name, folder, precision, steps, compiled, device = arguments()
    shape = SHAPES[name]
    beta1, beta2 = shape.betas
    recipe = recipe_from_mapping(
        {
            "name": "benchmark",
            "run": str(folder / "run"),
            "data": json.loads((folder / "data.json").read_text()),
            **networks(shape),
            "training": {
                "budget": f"{steps} steps",
                "batch": f"{shape.batch} images",
                "optimizer": {
                    "kind": "adamw",
                    "learning_rate": shape.learning_rate,
                    "beta1": beta1,
                    "beta2": beta2,
                    "weight_decay": shape.weight_decay,
                },
                "average": {"half_life": f"{EMA_HALF_LIFE * shape.batch} images"},
                "validation": {"every": f"{10 * steps} steps", "amount": f"{shape.batch} images"},
                "checkpoints": {"every": f"{10 * steps} steps"},
            },
            "layout": {"precision": precision, "compile": compiled, "device": device, "micro_batch": shape.batch},
            "sampling": {"kind": "images", "count": 1, "steps": 1},
        }
    )
    figures = Figures(shape.batch)
    original = loop.train_step

    def watched(job, step):
        measured, verdict = original(job, step)
        figures.step(next(value for name, value in measured.items() if name.endswith("loss")))
        return measured, verdict

    loop.train_step = watched
    run = train(recipe, show_progress=False)
    shutil.rmtree(folder / "run")
    figures.report(warmup=steps // 5, parameters=sum(run.facts["parameters"].values()))


if __name__ == "__main__":
    main()

"""genscale itself: ``train()`` with everything that it always does (guard, metrics, checkpoints, run directory)."""

from __future__ import annotations

import json
import shutil

from figures import Figures
from shapes import arguments

from genscale.recipe.load import recipe_from_mapping
from genscale.training import loop
from genscale.training.run import train


def main() -> None:
    shape, folder, precision, steps, compiled = arguments()
    recipe = recipe_from_mapping(
        {
            "name": "benchmark",
            "run": str(folder / "run"),
            "data": json.loads((folder / "data.json").read_text()),
            "model": {
                "layers": shape.layers,
                "width": shape.width,
                "heads": shape.heads,
                "context": shape.context,
                "norm": "layer",
                "positions": "learned",
                "feed_forward": "gelu",
            },
            "training": {
                "budget": f"{steps} steps",
                "batch": f"{shape.batch} samples",
                "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "beta2": 0.99},
                "validation": {"every": f"{10 * steps} steps", "amount": f"{shape.batch} samples"},
                "checkpoints": {"every": f"{10 * steps} steps"},
            },
            "layout": {"precision": precision, "compile": compiled, "device": "cpu", "micro_batch": shape.batch},
        }
    )
    figures = Figures(shape.tokens)
    original = loop.train_step

    def watched(job, step):
        measured, verdict = original(job, step)
        figures.step(measured["loss"])
        return measured, verdict

    loop.train_step = watched
    train(recipe, show_progress=False)
    shutil.rmtree(folder / "run")
    figures.report(warmup=steps // 5)


if __name__ == "__main__":
    main()

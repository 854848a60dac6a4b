"""genscale on some ranks: ``train()`` with everything that it always does. ``how`` is the recipe's layout as JSON."""

from __future__ import annotations

import json

from figures import Figures
from kernels import milliseconds_by_category
from ranks import RANK, arguments, device, report
from torch.profiler import profile, supported_activities

from genscale.recipe.load import recipe_from_mapping
from genscale.training import loop
from genscale.training.run import train

PROFILED = 3
"""The last steps, if they are."""


def main() -> None:
    shape, folder, precision, steps, how, options = arguments()
    place = device()
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
            "layout": {
                "precision": precision,
                "compile": "compile" in options,
                "device": place.type,
                **json.loads(how),
            },
        }
    )
    figures = Figures(shape.tokens)
    original = loop.train_step
    recorded: list[profile] = []

    def watched(job, step):
        if "profile" in options and step == steps - PROFILED:
            recorded.append(profile(activities=list(supported_activities())))
            recorded[0].start()
        measured, verdict = original(job, step)
        figures.step(measured["loss"])
        if recorded and step == steps - 1:
            recorded[0].stop()
        return measured, verdict

    loop.train_step = watched
    run = train(recipe, show_progress=False)
    others: dict[str, object] = {}
    if recorded:
        others["milliseconds"] = milliseconds_by_category(recorded[0], PROFILED)
    if RANK == 0:  # which writes the facts
        others |= {"flops": run.facts["flops_per_sample"], "peak": run.facts["peak"]["flops"]}
    report(figures, steps, **others)


if __name__ == "__main__":
    main()

"""``genscale train``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from genscale.cli.launch import elsewhere_options, train_elsewhere
from genscale.cli.options import json_option

if TYPE_CHECKING:
    from genscale.runs.run import Run


@click.command("train")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@elsewhere_options
@json_option
@click.pass_context
def train(ctx: click.Context, recipe: str, overrides: tuple[str, ...], as_json: bool, **asked: Any) -> None:
    """Train as a recipe says, or go on with its run.

    RECIPE is a file, or the name of a recipe that comes with genscale. OVERRIDES change it, for example
    training.budget='2 epochs'. The store is prepared first where it is not there yet. Ctrl-C at any moment is safe: the
    same command goes on from there. The same line runs under torchrun and srun, and with --on it is a Slurm job or runs
    on other hosts. With --json there is no progress display.
    """
    from genscale.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)  # before the heavy imports, so that a mistake is told at once
    words = (recipe, *overrides, *(["--json"] if as_json else []))
    code = train_elsewhere(loaded, words, asked)
    if code is not None:
        ctx.exit(code)

    from genscale.runtime.world import current_world
    from genscale.training.run import train

    run = train(loaded, show_progress=False if as_json else None)
    if current_world().rank != 0:
        return
    outcome = _outcome(run)
    if as_json:
        click.echo(json.dumps(outcome))
        return
    best = outcome["validation_loss"]
    held_out = "" if best is None else f", best validation loss {best:.4f} at step {outcome['best_step']:,}"
    early = ", stopped early" if outcome["stopped_early"] else ""
    click.echo(f"{run.directory}: {outcome['steps']:,} steps{early}{held_out}")
    click.echo(f"next: genscale sample {run.directory}    genscale report {run.directory}")


def _outcome(run: Run) -> dict[str, Any]:
    """Where the run is and what it came to; losses in nats a token."""
    facts = run.facts
    best = facts.get("best") or {}
    losses = [record["loss"] for record in run.metrics() if "loss" in record]
    return {
        "run": str(run.directory),
        "status": facts["status"],
        "steps": facts["step"],
        "loss": losses[-1] if losses else None,
        "validation_loss": best.get("loss"),
        "best_step": best.get("step"),
        "stopped_early": facts["stopped_early"],
        "seconds": facts["seconds"],
    }

"""``genscale average``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from genscale.cli.options import checkpoint_option, json_option


@click.command("average")
@click.argument("run")
@click.option(
    "--length",
    type=click.FloatRange(min=0, max=0.28, min_open=True),
    required=True,
    help="Relative standard deviation of the profile: the part of the run that the average looks back over.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The safetensors file.")
@checkpoint_option
@json_option
def average(run: str, length: float, out: Path, checkpoint: str | int, as_json: bool) -> None:
    """Put together an average of the weights of any length.

    For runs that kept averages with power-function profiles (training.average.kind: power). How far the profile is from
    the one asked for is printed: more snapshots (training.average.snapshot_every) bring it closer.
    """
    from genscale.runs.run import Run

    opened = Run.open(run)

    from genscale.training.checkpoint import export_weights
    from genscale.training.reconstruction import average_of

    objective, error = average_of(opened, length, checkpoint, "cpu")
    (network,) = objective.sampled
    export_weights(out, objective.networks[network].state_dict(), {"length": repr(length)})
    if as_json:
        click.echo(json.dumps({"out": str(out), "length": length, "profile_error": error}))
    else:
        click.echo(f"{out}: length {length:g}, its profile met to {error:.1%}")

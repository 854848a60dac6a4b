"""``genscale export``."""

from __future__ import annotations

import json

import click

from genscale.cli.options import checkpoint_option, json_option


@click.command("export")
@click.argument("run")
@click.option(
    "--to", required=True, metavar="FORMAT", help="diffusers: a folder for DiffusionPipeline.from_pretrained."
)
@click.option("--out", required=True, metavar="FOLDER", help="A new folder.")
@checkpoint_option
@json_option
def export(run: str, to: str, out: str, checkpoint: str | int, as_json: bool) -> None:
    """Write a run's weights for another library.

    \b
      genscale export runs/shoes --to diffusers --out shoes

    In Python then: DiffusionPipeline.from_pretrained("shoes", trust_remote_code=True). The network's code travels with
    its weights, which diffusers runs only when it is told so.
    """
    from genscale.export.run import export

    folder = export(run, to, out, checkpoint)
    click.echo(json.dumps({"folder": str(folder), "format": to}) if as_json else folder)

"""``genscale evaluate``."""

from __future__ import annotations

import json

import click

from genscale.cli.options import checkpoint_option, device_option, json_option


@click.command("evaluate")
@click.argument("run")
@checkpoint_option
@device_option
@json_option
def evaluate(run: str, checkpoint: str | int, device: str, as_json: bool) -> None:
    """Score a run on its held-out data.

    All of the held-out tokens are scored by the run's weights, and by Kneser-Ney 3-gram and 5-gram models that were
    fitted to the same training tokens. The report shows the scores from then on.
    """
    from genscale.runs.run import Run

    opened = Run.open(run)

    from genscale.evaluation.run import evaluate

    scores = evaluate(opened, checkpoint, device=device)
    if as_json:
        click.echo(json.dumps(scores))
        return
    rows = [
        ("held-out loss, nats per token", scores["loss"]),
        ("perplexity", scores["perplexity"]),
        ("bits per byte", scores["bits_per_byte"]),
        *((f"Kneser-Ney {name}, nats per token", loss) for name, loss in scores["baselines"].items()),
    ]
    for name, value in rows:
        click.echo(f"{name:<36}{value:>10.4f}")

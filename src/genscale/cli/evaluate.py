"""``genscale evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from genscale.cli.options import checkpoint_option, device_option, json_option


@click.command("evaluate")
@click.argument("run")
@click.option("--novelty", is_flag=True, help="Text: also let the model write, and ask how much of it is copied.")
@click.option("--count", type=click.IntRange(min=1), help="Images to draw; by default 5,000, or what the data allows.")
@click.option("--extractor", help="Images: the space of features: classifier, imagenet, or a TorchScript file.")
@checkpoint_option
@device_option
@json_option
def evaluate(run: str, checkpoint: str | int, device: str, as_json: bool, **options: Any) -> None:
    """Score a run on its held-out data. The report shows the scores from then on.

    Text: all of the held-out tokens are scored by the run's weights, and by Kneser-Ney 3-gram and 5-gram models that
    were fitted to the same training tokens.

    Images: drawn ones are compared with held-out ones, in the features of a classifier that is trained on the same
    data. Beside each distance stands its floor, that of real images to each other, and a test for copies of training
    images.
    """
    from genscale.runs.run import Run

    opened = Run.open(run)
    given = {name: value for name, value in options.items() if value}

    from genscale.evaluation.run import evaluate
    from genscale.runtime.progress import StageDisplay

    with StageDisplay(enabled=False if as_json else None) as display:
        if opened.recipe.data.kind == "images":
            given["on_progress"] = display
        scores = evaluate(opened, checkpoint, device=device, **given)
    if as_json:
        click.echo(json.dumps(scores))
        return
    for name, value in rows(scores):
        click.echo(f"{name:<60}{value:>12.4f}")


def rows(scores: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers that people look at, with their names."""
    if "baselines" not in scores:
        return [(name.replace("_", " "), value) for name, value in scores.items() if isinstance(value, float)]
    novelty = scores.get("novelty", {})
    return [
        ("held-out loss, nats per token", scores["loss"]),
        ("perplexity", scores["perplexity"]),
        ("bits per byte", scores["bits_per_byte"]),
        *((f"Kneser-Ney {name}, nats per token", loss) for name, loss in scores["baselines"].items()),
        *((name.replace("_", " "), value) for name, value in novelty.items() if isinstance(value, float)),
    ]

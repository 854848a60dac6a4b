"""``genscale sample``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from genscale.cli.options import checkpoint_option, device_option, json_option


@click.command("sample")
@click.argument("run")
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; may be given several times.")
@click.option("--suffix", help="Text that comes after the completion; for models that learned to fill in.")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Completions of each prompt.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens in each completion, at most.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 always takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=1), help="Choose among the k likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Choose among the fewest tokens that together are this likely.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    help="Choose among tokens at least this likely, relative to the likeliest.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    help="Above 1, tokens that occurred before become less likely.",
)
@click.option("--stop", multiple=True, help="Text that ends a completion; may be given several times.")
@click.option("--steps", type=click.IntRange(min=1), help="Unmasking steps of a masked-diffusion model.")
@click.option("--order", type=click.Choice(["random", "confidence"]), help="What such a model unmasks first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@checkpoint_option
@device_option
@json_option
def sample(
    run: str,
    prompts: tuple[str, ...],
    suffix: str | None,
    count: int,
    seed: int,
    checkpoint: str | int,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Let a trained model write.

    What is not given is as the run's recipe says, the prompts too.
    """
    from genscale.runs.run import Run

    opened = Run.open(run)
    prompts = prompts or opened.recipe.sampling.prompts or ("",)
    streamed = _Streamed(prompts[0]) if len(prompts) * count == 1 and not as_json else None

    from genscale.generation.run import sample

    completions = sample(
        opened,
        prompts,
        suffix=suffix,
        checkpoint=checkpoint,
        count=count,
        seed=seed,
        device=device,
        on_text=streamed,
        **{name: value for name, value in options.items() if value is not None and value != ()},
    )
    if as_json:
        click.echo(json.dumps([asdict(each) for each in completions], indent=2, ensure_ascii=False))
    elif streamed:
        streamed.close(suffix or "")
    else:
        for each in completions:
            click.secho(f"--- {each.index + 1} of {len(completions)}", dim=True)
            click.echo(each.prompt + each.text + (suffix or ""))


class _Streamed:
    """Writes the prompt and each piece of its completion as it comes; the prompt not before the first piece."""

    def __init__(self, prompt: str):
        self.pending = prompt

    def __call__(self, index: int, text: str) -> None:
        click.echo(self.pending + text, nl=False)
        self.pending = ""

    def close(self, suffix: str) -> None:
        click.echo(self.pending + suffix)

"""``genscale sample``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from genscale.cli.options import checkpoint_option, device_option, json_option
from genscale.runtime.errors import UserError

if TYPE_CHECKING:
    from genscale.runs.run import Run

_TEXT = {
    "--prompt": {"multiple": True, "help": "Text to go on from; may be given several times."},
    "--suffix": {"help": "Text that comes after the completion; for models that learned to fill in."},
    "--tokens": {"type": click.IntRange(min=1), "help": "Tokens in each completion, at most."},
    "--temperature": {"type": click.FloatRange(min=0), "help": "0 always takes the likeliest token."},
    "--top-k": {"type": click.IntRange(min=1), "help": "Choose among the k likeliest tokens."},
    "--top-p": {
        "type": click.FloatRange(min=0, max=1, min_open=True),
        "help": "Choose among the fewest tokens that together are this likely.",
    },
    "--min-p": {
        "type": click.FloatRange(min=0, max=1),
        "help": "Choose among tokens at least this likely, relative to the likeliest.",
    },
    "--repetition-penalty": {
        "type": click.FloatRange(min=0, min_open=True),
        "help": "Above 1, tokens that occurred before become less likely.",
    },
    "--stop": {"multiple": True, "help": "Text that ends a completion; may be given several times."},
    "--order": {"type": click.Choice(["random", "confidence"]), "help": "What a masked-diffusion model unmasks first."},
}
_IMAGES = {
    "--label": {"multiple": True, "help": "A class; given several times, they are taken in turn."},
    "--caption": {"multiple": True, "help": "What to draw, for models of captions; taken in turn."},
    "--grid": {"metavar": "ROWSxCOLUMNS", "help": "How the images are laid out, and so how many: 8x8."},
    "--out": {
        "metavar": "PATH",
        "help": "A grid (.png), arrays (.npz), or a folder of PNGs; by default a grid named after the run.",
    },
    "--guidance": {"type": click.FloatRange(min=0), "help": "1 is none; more follows the class or caption closer."},
    "--guidance-interval": {
        "type": (float, float),
        "metavar": "FROM TO",
        "help": "The part of the way from noise (0) to image (1) in which guidance acts.",
    },
    "--guide": {"metavar": "CHECKPOINT|RUN", "help": "A weaker model to push away from in place of no condition."},
    "--sampler": {
        "type": click.Choice(["auto", "euler", "heun", "ddim", "dpm_solver_2m", "ancestral"]),
        "help": "How a diffusion model goes from noise to images.",
    },
    "--truncation": {"type": click.FloatRange(min=0, max=1), "help": "GANs: less is less varied and more typical."},
    "--interpolate": {
        "type": click.IntRange(min=0),
        "metavar": "SEED",
        "help": "Each row goes from an image of --seed to one of this seed.",
    },
    "--image": {"metavar": "FILE", "help": "A picture to start from."},
    "--mask": {"metavar": "FILE", "help": "White where the picture is drawn anew, black where it is kept."},
    "--strength": {
        "type": click.FloatRange(min=0, max=1, min_open=True),
        "help": "How far the picture is noised; by default 0.6, or 1 with a mask.",
    },
}
_SHARED = {
    "--count": {"type": click.IntRange(min=1), "help": "Completions of each prompt (by default 1), or images."},
    "--steps": {"type": click.IntRange(min=1), "help": "Steps of a diffusion model, or of unmasking."},
    "--seed": {"type": click.IntRange(min=0), "default": 0, "show_default": True, "help": "What is drawn by chance."},
}


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    for name, how in reversed([*_SHARED.items(), *_TEXT.items(), *_IMAGES.items()]):
        command = click.option(name, **how)(command)  # type: ignore[arg-type]
    return command


@click.command("sample")
@click.argument("run")
@_with_options
@checkpoint_option
@device_option
@json_option
def sample(run: str, checkpoint: str | int, device: str, as_json: bool, seed: int, **options: Any) -> None:
    """Let a trained model write, or draw.

    What is not given is as the run's recipe says, the prompts too.

    \b
      genscale sample runs/tiny --prompt "Once " --temperature 0.8
      genscale sample runs/shoes --label sneaker --guidance 2 --grid 8x8 --out shoes.png
    """
    from genscale.runs.run import Run

    opened = Run.open(run)
    draws = opened.recipe.data.kind == "images"
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    for name in given:
        written = f"--{name.replace('_', '-')}"
        if written in (_TEXT if draws else _IMAGES):
            there = ", ".join(_IMAGES if draws else _TEXT)
            raise UserError(f"{written}: {run} {'draws images' if draws else 'writes text'}, and has {there}")
    (_draw if draws else _write)(opened, as_json, seed=seed, checkpoint=checkpoint, device=device, **given)


def _write(run: Run, as_json: bool, count: int = 1, prompt: tuple[str, ...] = (), **options: Any) -> None:
    from genscale.recipe.sampling import TextSampling

    assert isinstance(run.recipe.sampling, TextSampling)  # as its data is text
    prompts = prompt or run.recipe.sampling.prompts or ("",)
    streamed = _Streamed(prompts[0]) if len(prompts) * count == 1 and not as_json else None

    from genscale.generation.run import sample_text

    completions = sample_text(run, prompts, count=count, on_text=streamed, **options)
    suffix = options.get("suffix", "")
    if as_json:
        click.echo(json.dumps([asdict(each) for each in completions], indent=2, ensure_ascii=False))
    elif streamed:
        streamed.close(suffix)
    else:
        for each in completions:
            click.secho(f"--- {each.index + 1} of {len(completions)}", dim=True)
            click.echo(each.prompt + each.text + suffix)


def _draw(
    run: Run,
    as_json: bool,
    out: str | None = None,
    label: tuple[str, ...] = (),
    caption: tuple[str, ...] = (),
    **options: Any,
) -> None:
    from genscale.generation.grid import writable
    from genscale.generation.image_run import sample_images

    path = writable(out or f"{run.directory.resolve().name}.png")
    drawn = sample_images(run, labels=label, captions=caption, show_progress=False if as_json else None, **options)
    written = drawn.save(path)
    if as_json:
        rows, columns = drawn.cells
        said = {"paths": [str(each) for each in written], "labels": drawn.labels, "captions": drawn.captions}
        click.echo(json.dumps({**said, "rows": rows, "columns": columns}, ensure_ascii=False))
    else:
        click.echo(written[0] if len(written) == 1 else f"{path}: {len(written)} images")


class _Streamed:
    """Writes the prompt and each piece of its completion as it comes; the prompt not before the first piece."""

    def __init__(self, prompt: str):
        self.pending = prompt

    def __call__(self, index: int, text: str) -> None:
        click.echo(self.pending + text, nl=False)
        self.pending = ""

    def close(self, suffix: str) -> None:
        click.echo(self.pending + suffix)

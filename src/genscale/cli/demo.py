"""``genscale demo``: the whole life-cycle of the three families on real data that is already on the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from genscale.cli.evaluate import rows

if TYPE_CHECKING:
    from genscale.runs.run import Run

PROMPTS = ("def ", "import ", "class ")
RECIPES = {"language": "demo", "diffusion": "digits-diffusion", "gan": "digits-gan"}


@click.command("demo")
@click.argument("overrides", nargs=-1)
@click.option("--only", type=click.Choice(list(RECIPES)), help="One family instead of all three.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end and nothing else.")
def demo(overrides: tuple[str, ...], only: str | None, as_json: bool) -> None:
    """The whole life-cycle on real data that is already here, for three models: a language model on the sources of
    Python's own standard library, a diffusion model and a GAN on scanned digits.

    About ten minutes on two free CPU cores, less where they have bf16. Ctrl-C at any moment is safe; the same command
    goes on from there.
    OVERRIDES change the recipe of the one family that --only names, for example training.budget='1M tokens'.
    """
    import json

    from genscale.runtime.errors import UserError

    if overrides and only is None:
        raise UserError(f"'{overrides[0]}' changes one recipe; say of which family with --only {' | '.join(RECIPES)}")

    from genscale.recipe.load import load_recipe
    from genscale.reports.report import write_report
    from genscale.training.run import train

    def say(text: str = "") -> None:
        if not as_json:
            click.echo(text)

    recipes = {family: load_recipe(RECIPES[family], list(overrides)) for family in ([only] if only else RECIPES)}
    found: dict[str, Any] = {}
    for family, recipe in recipes.items():
        say(f"\n=== {family}: {recipe.description} -> {recipe.run_directory}")
        run = train(recipe, show_progress=False if as_json else None)
        result = _language(run, say) if family == "language" else _images(run, say)
        report = write_report(run)
        say(f"\nThe report, one page that opens without a network: {report}")
        found[family] = {"run": str(run.directory), "report": str(report), **result}
    if as_json:
        click.echo(json.dumps(found))
        return
    say("\nWhat to try next:")
    for family, recipe in recipes.items():
        for command in _NEXT[family]:
            say("  " + command.format(run=recipe.run_directory, store=recipe.store_directory))


_NEXT = {
    "language": (
        'genscale sample {run} --prompt "def read_" --temperature 0.6 --count 3',
        "genscale data prepare tiny name=mine data.sources='[\"~/my-texts/**/*.txt\"]'",
        "genscale train tiny name=mine",
    ),
    "diffusion": (
        "genscale sample {run} --label 3 --guidance 2 --grid 8x8 --out threes.png",
        "genscale data report {store}",
    ),
    "gan": (
        "genscale sample {run} --label 7 --truncation 0.7 --grid 8x8 --out sevens.png",
        "genscale evaluate {run}",
    ),
}


def _language(run: Run, say: Any) -> dict[str, Any]:
    """Scores beside the n-gram models', and completions."""
    from genscale.evaluation.run import evaluate
    from genscale.generation.run import sample

    say("\nScoring the held-out files, and two n-gram models fitted to the same training tokens ...")
    scores = evaluate(run)
    completions = sample(run, list(PROMPTS), count=2, seed=run.recipe.seed)
    for each in completions:
        say(f"\n--- {each.prompt!r} " + "-" * 60)
        say(each.prompt + each.text)
    say("\n" + "-" * 72)
    for name, value in rows(scores):
        say(f"{name:<60}{value:>12.4f}")
    return {**scores, "completions": [{"prompt": each.prompt, "text": each.text} for each in completions]}


def _images(run: Run, say: Any) -> dict[str, Any]:
    """Scores of as many images as there are held out, each beside the distance of real images to each other."""
    from genscale.evaluation.run import evaluate

    say("\nDrawing images and comparing them with held-out ones, in the features of a classifier of the same data ...")
    scores = evaluate(run)
    for name, value in rows(scores):
        say(f"{name:<60}{value:>12.4f}")
    return scores

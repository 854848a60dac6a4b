"""``genscale demo``: the whole life-cycle on real data that is already on the machine."""

from __future__ import annotations

import click

PROMPTS = ("def ", "import ", "class ")


@click.command("demo")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end and nothing else.")
def demo(overrides: tuple[str, ...], as_json: bool) -> None:
    """The whole life-cycle on real text that is already here: Python's own standard library.

    Five to seven minutes on two free CPU cores. Ctrl-C at any moment is safe; the same command goes on from there.
    OVERRIDES change the recipe 'demo', for example training.budget='1M tokens'.
    """
    import json

    from genscale.evaluation.run import evaluate
    from genscale.generation.run import sample
    from genscale.recipe.load import load_recipe
    from genscale.reports.report import write_report
    from genscale.training.run import train

    def say(text: str = "") -> None:
        if not as_json:
            click.echo(text)

    recipe = load_recipe("demo", list(overrides))
    say(f"genscale demo: data, tokenizer, training, evaluation, samples, report -> {recipe.run_directory}")
    run = train(recipe, show_progress=False if as_json else None)
    say("\nScoring the held-out files, and two n-gram models fitted to the same training tokens ...")
    scores = evaluate(run)
    completions = sample(run, list(PROMPTS), count=2, seed=recipe.seed)
    report = write_report(run)
    if as_json:
        texts = [{"prompt": each.prompt, "text": each.text} for each in completions]
        click.echo(json.dumps({"run": str(run.directory), "report": str(report), **scores, "completions": texts}))
        return
    for each in completions:
        say(f"\n--- {each.prompt!r} " + "-" * 60)
        say(each.prompt + each.text)
    say("\n" + "-" * 72)
    say(f"{'held-out loss, nats per token':<44}{scores['loss']:>8.4f}")
    for name, loss in scores["baselines"].items():
        say(f"{'  interpolated Kneser-Ney ' + name:<44}{loss:>8.4f}")
    say(f"{'bits per byte':<44}{scores['bits_per_byte']:>8.4f}")
    say(
        f"""
The report, one page that opens without a network: {report}

What to try next:
  genscale sample {run.directory} --prompt "def read_" --temperature 0.6 --count 3
  genscale data report {recipe.store_directory}
  genscale recipe show demo
  genscale data prepare tiny name=mine data.sources='["~/my-texts/**/*.txt"]'
  genscale train tiny name=mine
"""
    )

"""The ``genscale`` command: which commands there are, and how each kind of failure ends.

A user's mistake is one line on standard error and exit code 2; Ctrl-C one line and 130; a fault of genscale keeps its
traceback. Nothing heavy is imported here, so that ``--help`` is instant.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from genscale.cli.groups import LazyCommand, LazyCommands
from genscale.runtime.errors import UserError

COMMANDS = {
    "demo": LazyCommand("genscale.cli.demo", "demo", "The whole life-cycle on data that every machine has."),
    "recipe": LazyCommand("genscale.cli.recipe_commands", "recipe", "List, show and describe recipes."),
    "data": LazyCommand("genscale.cli.data_commands", "data", "Prepare stores of training data and report on them."),
    "plan": LazyCommand(
        "genscale.cli.plan", "plan", "What each process of a layout would hold, without the processes."
    ),
    "verify": LazyCommand("genscale.cli.verify", "verify", "Run the same steps on two layouts, and find what differs."),
    "train": LazyCommand("genscale.cli.train", "train", "Train as a recipe says, or go on with its run."),
    "launch": LazyCommand("genscale.cli.launch", "launch", "Start a run on a cluster that takes manifests."),
    "sample": LazyCommand("genscale.cli.sample", "sample", "Let a trained model write or draw."),
    "evaluate": LazyCommand("genscale.cli.evaluate", "evaluate", "Score a run on its held-out data."),
    "average": LazyCommand("genscale.cli.average", "average", "Average a run's weights over any length."),
    "export": LazyCommand("genscale.cli.export", "export", "Write a run in another library's format."),
    "report": LazyCommand("genscale.cli.report", "report", "Write a run's report, one page that needs no network."),
}

GOES_ON = (["train"], ["demo"], ["data", "prepare"])
"""Commands that, interrupted, go on from where they were when called again."""

commands = LazyCommands(
    COMMANDS,
    help="Train a generative model from raw data to a shipped model.\n\nBegin with 'genscale demo', or see 'genscale "
    "recipe list' for what there is to train.",
)


def _print_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        import genscale

        click.echo(f"genscale {genscale.__version__}")
        ctx.exit()


_version = click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version)
_version.help = "Show the version and exit."
commands.params.append(_version)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit; by default the process's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = commands.main(words, prog_name="genscale", standalone_mode=False)
    except UserError as error:
        _end(None if error.told else f"error: {error}", error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _end(f"error: {f'{context.command_path}: ' if context else ''}{error.format_message()}", 2)
    except (click.Abort, KeyboardInterrupt):
        goes_on = any(words[: len(command)] == command for command in GOES_ON)
        _end(f"interrupted{'; the same command goes on from here' if goes_on else ''}", 130)
    except OSError as error:
        message = _disk_message(error)
        if message is None:
            raise
        _end(f"error: {message}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _end(line: str | None, code: int) -> NoReturn:
    if line is not None:
        click.echo(line, err=True)
    sys.exit(code)


def _disk_message(error: OSError) -> str | None:
    """One line for what is wrong with the disk or with the rights on it; None for any other failure."""
    from genscale.runs.disk import disk_error

    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path or 'a file'}: permission denied"
    explained = disk_error(error, path or Path.cwd())
    return str(explained) if explained else None

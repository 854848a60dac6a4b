"""Groups of commands: they suggest the nearest name, and import a command only when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import click

from genscale.runtime.errors import nearest


class Commands(click.Group):
    """A group that prints its help when nothing is given, and suggests a name for one that it does not know."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            hint = nearest(args[0], known) or f"; there are {', '.join(known)}"
            raise click.UsageError(f"no command '{args[0]}'{hint}", ctx)
        return super().resolve_command(ctx, args)


class LazyCommand(NamedTuple):
    module: str
    name: str
    """The command's name in its module."""
    summary: str
    """The first sentence of its help, so that listing the commands imports none of them."""


class LazyCommands(Commands):
    """A group whose commands are imported when they are called."""

    def __init__(self, commands: dict[str, LazyCommand], help: str):
        super().__init__(help=help)
        self.lazy = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        lazy = self.lazy[cmd_name]
        command: click.Command = getattr(import_module(lazy.module), lazy.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in self.lazy.items()])

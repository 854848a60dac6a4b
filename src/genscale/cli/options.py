"""Options that several commands share."""

from __future__ import annotations

import click


class Checkpoint(click.ParamType):
    """``best``, ``last``, or a step as a whole number."""

    name = "checkpoint"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        if isinstance(value, int) or value in ("best", "last"):
            return value
        if value.isdecimal():
            return int(value)
        self.fail(f"expected best, last or the number of a step, found '{value}'", param, ctx)


checkpoint_option = click.option(
    "--checkpoint", type=Checkpoint(), default="best", show_default=True, help="best, last, or the number of a step."
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto: the accelerator if there is one, else the CPU."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

"""``genscale report``."""

from __future__ import annotations

import click


@click.command("report")
@click.argument("run")
def report(run: str) -> None:
    """Write a run's report, one page that needs no network.

    It may be written at any time, also while the run trains. Prints where it is.
    """
    from genscale.reports.report import write_report
    from genscale.runs.run import Run

    click.echo(write_report(Run.open(run)))

"""The live display: what a run or a data stage is doing, on the terminal or line by line in a log.

On a terminal: bars, redrawn at most four times a second. Elsewhere (a file, a pipe, a scheduler's log): a plain line
every ten seconds and one at the end. All of it goes to standard error, so that standard output stays for results.
Nothing is drawn from a thread: an update between two redraws costs a microsecond, and leaving the ``with`` block in any
way, Ctrl-C included, gives the cursor back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_LIVE_SECONDS = 0.25
_PLAIN_SECONDS = 10.0


def duration(seconds: float) -> str:
    """``0:07``, ``2:13``, ``1:02:13``, ``3 d 04:00``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Display:
    """A live picture, or plain lines, of a state that changes far more often than anyone looks.

    Args:
        enabled: False shows nothing at all; True and None show what suits the place that is written to.
        console: where to; by default standard error.
    """

    def __init__(self, enabled: bool | None, console: Console | None):
        self._enabled = enabled is not False
        self._live: Any = None
        self._due = 0.0  # time.monotonic() of the next redraw or line
        self._unseen = False  # whether the state changed after what was last shown
        if self._enabled:
            from rich.console import Console

            self._console = console or Console(stderr=True, highlight=False)
            self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
            self._interval = _LIVE_SECONDS if self._is_live else _PLAIN_SECONDS

    def __enter__(self) -> Self:
        if self._enabled and self._is_live:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._picture)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # redraws a last time and shows the cursor again
            self._live = None
        elif self._enabled and self._unseen:
            self._show()

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _changed(self, now: bool = False) -> None:
        """To be called after each change of the state; shows it when it is time, or ``now``."""
        if not self._enabled:
            return
        self._unseen = True
        if now or time.monotonic() >= self._due:
            self._show()

    def _show(self) -> None:
        self._due = time.monotonic() + self._interval
        self._unseen = False
        if self._live is not None:
            self._live.refresh()
        elif not self._is_live:
            self.message(self._line())

    def _picture(self) -> RenderableType:
        raise NotImplementedError

    def _line(self) -> str:
        raise NotImplementedError


class TrainingDisplay(_Display):
    """The progress of a training run; a context manager.

    >>> with TrainingDisplay(total_steps=2000) as display:  # doctest: +SKIP
    ...     display.update(10, losses={"loss": 3.21}, rate=(11_900.0, "tokens"))
    """

    def __init__(self, total_steps: int, enabled: bool | None = None, console: Console | None = None):
        super().__init__(enabled, console)
        self._total = total_steps
        self._step = 0
        self._values: dict[str, Any] = {}

    def update(
        self,
        step: int,
        *,
        losses: dict[str, float] | None = None,
        validation_loss: float | None = None,
        best: float | None = None,
        rate: tuple[float, str] | None = None,
        utilisation: float | None = None,
        utilisation_kind: str | None = None,
        learning_rate: float | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Say where the run is. What is None stays as it was last shown.

        Args:
            losses: of the step, by name: ``loss``, or one for each phase.
            rate: how much in a second, and of what: tokens, samples.
            utilisation: the fraction of the peak, 0 to 1.
            utilisation_kind: of which peak, "measured peak" or "known peak".
            best: the best validation loss so far.
        """
        if not self._enabled:
            return
        values = {
            "losses": losses,
            "validation_loss": validation_loss,
            "best": best,
            "rate": rate,
            "utilisation": utilisation,
            "utilisation_kind": utilisation_kind,
            "learning_rate": learning_rate,
            "seconds_left": seconds_left,
        }
        self._values.update((name, value) for name, value in values.items() if value is not None)
        self._step = step
        self._changed()

    def _parts(self) -> list[tuple[str, str]]:
        """(name, value) pairs of what is known, in the order that they are shown."""
        known = self._values
        parts = []
        parts += [(name, f"{value:.4f}") for name, value in known.get("losses", {}).items()]
        if "validation_loss" in known:
            best = f" (best {known['best']:.4f})" if "best" in known else ""
            parts.append(("validation", f"{known['validation_loss']:.4f}{best}"))
        if "rate" in known:
            parts.append(("", f"{known['rate'][0]:,.0f} {known['rate'][1]}/s"))
        if "utilisation" in known:
            parts.append(("", f"{known['utilisation']:.0%} of {known.get('utilisation_kind', 'peak')}"))
        if "learning_rate" in known:
            parts.append(("lr", f"{known['learning_rate']:.2e}"))
        return parts

    def _left(self) -> str:
        return f"{duration(self._values['seconds_left'])} left" if "seconds_left" in self._values else ""

    def _line(self) -> str:
        share = self._step / self._total if self._total else 1.0
        parts = [f"step {self._step:,}/{self._total:,} ({share:.0%})"]
        parts += [f"{name} {value}".strip() for name, value in self._parts()]
        return "  ".join(part for part in [*parts, self._left()] if part)

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(
            Text("training", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step, width=min(40, self._console.width // 3)),
            Text(f"step {self._step:,} of {self._total:,}"),
            Text(self._left(), style="cyan"),
        )
        lines = [Text()]
        for name, value in self._parts():  # a narrow terminal breaks the line between parts, not inside one
            part = Text.assemble((f"{name} " if name else "", "dim"), value, "   ")
            if len(lines[-1]) + len(part.plain.rstrip()) > self._console.width:
                lines.append(Text())
            lines[-1].append_text(part)
        return Group(bar, *lines)


class StageDisplay(_Display):
    """The progress of work in stages; a context manager that is called as ``display(stage, done, total, unit)``.

    >>> with StageDisplay() as display:  # doctest: +SKIP
    ...     prepare(recipe, on_progress=display)
    """

    def __init__(self, enabled: bool | None = None, console: Console | None = None):
        super().__init__(enabled, console)
        self._stages: dict[str, _Stage] = {}
        self._current: str | None = None

    def __call__(self, stage: str, done: float, total: float | None, unit: str) -> None:
        """``done`` of ``total`` (None: not known) in ``unit``: bytes, documents. A new stage ends the one before."""
        if not self._enabled:
            return
        if stage != self._current and self._current is not None and not self._is_live and self._unseen:
            self._show()  # the last line of the stage that ends
        known = self._stages.get(stage)
        if known is None:
            known = self._stages[stage] = _Stage(stage)
        known.update(done, total, unit)
        first = stage != self._current
        self._current = stage
        self._changed(now=first or (total is not None and done >= total and not known.finished))
        known.finished = total is not None and done >= total

    def _line(self) -> str:
        return self._stages[self._current].line() if self._current is not None else ""

    def _picture(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        for stage in self._stages.values():
            bar = ProgressBar(total=stage.total, completed=stage.done, width=min(40, self._console.width // 3))
            table.add_row(Text(stage.name, style="bold"), bar, Text(stage.amount()), Text(stage.rate(), style="dim"))
        return table


class _Stage:
    """Where one stage is, and how fast."""

    def __init__(self, name: str):
        self.name = name
        self.done = 0.0
        self.total: float | None = None
        self.unit = ""
        self.finished = False
        self._began = self._updated = time.monotonic()

    def update(self, done: float, total: float | None, unit: str) -> None:
        self.done, self.total, self.unit = done, total, unit
        self._updated = time.monotonic()

    def amount(self) -> str:
        done = _amount(self.done, self.unit)
        return done if self.total is None else f"{done} of {_amount(self.total, self.unit)}"

    def rate(self) -> str:
        seconds = self._updated - self._began
        return f"{_amount(self.done / seconds, self.unit)}/s" if seconds >= 1.0 else ""

    def line(self) -> str:
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return "  ".join(part for part in (f"{self.name}: {self.amount()}{share}", self.rate()) if part)


def _amount(value: float, unit: str) -> str:
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for name, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return f"{value:.0f} bytes"


@contextmanager
def progress(
    description: str, total: float | None, unit: str, enabled: bool | None = None, console: Console | None = None
) -> Iterator[Callable[[float], None]]:
    """One stage; yields ``advance(count)``.

    >>> with progress("downloading", total=10_000, unit="bytes") as advance:  # doctest: +SKIP
    ...     advance(512)
    """
    done = 0.0

    with StageDisplay(enabled, console) as display:

        def advance(count: float = 1) -> None:
            nonlocal done
            done += count
            display(description, done, total, unit)

        yield advance

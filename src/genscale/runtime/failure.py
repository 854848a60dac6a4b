"""When one process of a run fails, all end: the first that fails says why, the others end without a word."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from genscale.runtime.errors import UserError
from genscale.runtime.joining import SharedStore

_COLLECTIVE = re.compile(
    r"gloo/|Connection (closed|reset)|Broken pipe|Socket closed|Timed out waiting|Watchdog caught|Dist\w*Error"
)


class RanksStopped(UserError):
    """A process of the run has gone, hangs or failed, so that this one cannot go on."""

    def __init__(self, line: str, exit_code: int = 1, told: bool = False):
        super().__init__(line)
        self.exit_code = exit_code
        self.told = told


@dataclass(frozen=True)
class Failure:
    """Why a run ends."""

    rank: int
    """Of the process that tells it."""
    line: str
    exit_code: int
    hangs: bool = False
    """Whether the ranks' flight records are worth keeping."""
    gone: tuple[int, ...] = ()
    """Ranks that will never read this."""

    def error(self, rank: int) -> RanksStopped:
        """To be raised on that rank."""
        return RanksStopped(self.line, self.exit_code, told=rank != self.rank)


def claim(store: SharedStore, failure: Failure) -> Failure:
    """The first failure of the run, which is this one where no rank was faster."""
    return _read(store.claim("failed", json.dumps(asdict(failure))))


def claimed(store: SharedStore) -> Failure | None:
    """The run's failure, if there is one."""
    return _read(store.get("failed")) if store.has("failed") else None


def _read(text: str) -> Failure:
    values = json.loads(text)
    return Failure(**{**values, "gone": tuple(values["gone"])})


def is_collective_failure(error: BaseException) -> bool:
    """Whether the error comes from talking to the other ranks: a consequence, whose cause is elsewhere."""
    return isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(f"{type(error).__name__} {error}"))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective waited too long, rather than found the other side closed."""
    return bool(re.search(r"tim(ed )?.?out", str(error), re.IGNORECASE))


def exit_code(error: BaseException) -> int:
    """What the process ends with when nobody catches the error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return getattr(error, "exit_code", 2) if isinstance(error, UserError) else 1

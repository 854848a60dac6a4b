"""The live display: bars on a terminal, lines elsewhere, nothing when it is switched off."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from rich.console import Console

from genscale.runtime import progress as module
from genscale.runtime.progress import StageDisplay, TrainingDisplay, duration, progress


def console(terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)


def lines(target: Console) -> list[str]:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue().splitlines()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (133, "2:13"), (3733, "1:02:13"), (273_600, "3 d 04:00"), (-1, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_every_ten_seconds_and_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, target = Clock(monkeypatch), console(terminal=False)
    with TrainingDisplay(1000, console=target) as display:
        for step in range(1, 252):  # 25 seconds, ten steps a second
            display.update(step, losses={"loss": 4.0 - step / 1000})
            clock.now += 0.1
    steps = [int(re.match(r"step (\d+)/1,000", line).group(1)) for line in lines(target)]  # type: ignore[union-attr]
    assert steps[0] == 1
    assert steps[-1] == 251
    assert all(100 <= later - earlier <= 102 for earlier, later in pairwise(steps[:-1]))
    assert len(steps) == 4


def test_a_line_says_everything_that_is_known() -> None:
    target = console(terminal=False)
    with TrainingDisplay(2000, console=target) as display:
        display.update(
            500,
            losses={"loss": 2.34561},
            validation_loss=2.41,
            best=2.4,
            rate=(12_345.6, "tokens"),
            utilisation=0.612,
            utilisation_kind="measured peak",
            learning_rate=3e-4,
            seconds_left=133,
        )
    assert lines(target) == [
        "step 500/2,000 (25%)  loss 2.3456  validation 2.4100 (best 2.4000)  12,346 tokens/s  "
        "61% of measured peak  lr 3.00e-04  2:13 left"
    ]


def test_values_stay_until_they_change() -> None:
    target = console(terminal=False)
    with TrainingDisplay(10, console=target) as display:
        display.update(1, validation_loss=3.0)
        display.update(2, losses={"loss": 2.0})
    assert lines(target)[-1] == "step 2/10 (20%)  loss 2.0000  validation 3.0000"


def test_switched_off_it_writes_nothing() -> None:
    target = console(terminal=True)
    with TrainingDisplay(10, enabled=False, console=target) as display:
        display.update(1, losses={"loss": 1.0})
        display.message("hello")
    with progress("reading", 10, "documents", enabled=False, console=target) as advance:
        advance(10)
    assert lines(target) == []


def test_messages_are_printed_as_they_are() -> None:
    target = console(terminal=False)
    with TrainingDisplay(10, console=target) as display:
        display.message("[bold]not markup[/bold]")
    assert lines(target) == ["[bold]not markup[/bold]"]


def test_live_it_redraws_at_most_five_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, target = Clock(monkeypatch), console(terminal=True)
    shown = []
    with TrainingDisplay(10_000, console=target) as display:
        monkeypatch.setattr(display, "_picture", lambda: shown.append(1) or "")
        display._live._get_renderable = display._picture
        for step in range(2000):
            display.update(step, losses={"loss": 1.0})
            clock.now += 0.001
    assert 4 <= len(shown) <= 5 * 2 + 2  # two seconds, and the pictures at the beginning and at the end


def test_a_narrow_terminal_breaks_between_values() -> None:
    target = console(terminal=True, width=60)
    with TrainingDisplay(10, console=target) as display:
        display.update(
            1,
            losses={"loss": 1.0},
            validation_loss=2.0,
            best=2.0,
            utilisation=0.5,
            utilisation_kind="measured peak",
        )
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in lines(target)]
    assert "loss 1.0000   validation 2.0000 (best 2.0000)" in plain
    assert "50% of measured peak" in plain


def test_stages_follow_the_callback_of_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, target = Clock(monkeypatch), console(terminal=False)
    with StageDisplay(console=target) as display:
        for done in range(0, 101, 20):
            display("reading", done * 1e6, 100e6, "bytes")
            clock.now += 1
        for done in range(25):
            display("tokenising", done, None, "documents")
            clock.now += 0.2
    assert lines(target) == [
        "reading: 0 bytes of 100.0 MB (0%)",
        "reading: 100.0 MB of 100.0 MB (100%)  20.0 MB/s",
        "tokenising: 0 documents",
        "tokenising: 24 documents  5 documents/s",
    ]


def test_progress_counts_up() -> None:
    target = console(terminal=False)
    with progress("fitting", total=3, unit="shards", console=target) as advance:
        for _ in range(3):
            advance()
    assert lines(target)[-1] == "fitting: 3 shards of 3 shards (100%)"


def test_ctrl_c_gives_the_cursor_back() -> None:
    program = (
        "import time\n"
        "from genscale.runtime.progress import TrainingDisplay\n"
        "with TrainingDisplay(100) as display:\n"
        "    for step in range(1000):\n"
        "        display.update(step, losses={'loss': 1.0})\n"
        "        time.sleep(0.02)\n"
    )
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=terminal, stdout=terminal, env=environment)
    os.close(terminal)
    written = b""
    try:
        deadline = time.monotonic() + 30
        while b"step" not in written and time.monotonic() < deadline:
            written += os.read(controller, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                piece = os.read(controller, 4096)
            except OSError:  # Linux says EIO when the other side is closed
                break
            if not piece:
                break
            written += piece
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    hide, show = b"\x1b[?25l", b"\x1b[?25h"
    assert hide in written
    assert written.rfind(show) > written.rfind(hide)
    assert b"KeyboardInterrupt" in written

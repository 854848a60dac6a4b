"""Ctrl-C saves and leaves; the same command goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.training import loop
from genscale.training.interruption import watched_signals
from genscale.training.run import train


def test_sigterm_is_noted_however_often_it_comes() -> None:
    acted = []
    before = signal.signal(signal.SIGTERM, lambda *_: acted.append(True))
    try:
        with watched_signals() as interruption:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.requested()
            assert not acted
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_interrupt_is_noted_and_the_second_acts() -> None:
    number = signal.SIGINT
    acted = []
    before = signal.signal(number, lambda *_: acted.append(True))
    try:
        with watched_signals() as interruption:
            assert not interruption.requested()
            os.kill(os.getpid(), number)
            assert interruption.requested()
            assert not acted
            os.kill(os.getpid(), number)
            assert acted == [True]
        os.kill(os.getpid(), number)
        assert acted == [True, True]
    finally:
        signal.signal(number, before)


def test_an_interrupted_run_is_saved_at_once_and_goes_on(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step

    def interrupt(job, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return original(job, step)

    monkeypatch.setattr(loop, "train_step", interrupt)
    chosen = recipe(**{"training.checkpoints.every": "100 steps", "training.validation.every": "100 steps"})
    with pytest.raises(KeyboardInterrupt):
        train(chosen, show_progress=False)
    run = Run.open(chosen.run_directory)
    assert run.facts["status"] == "interrupted"
    assert run.facts["step"] == 8, "the step that was under way is finished and saved"
    run = train(chosen, show_progress=False)
    assert run.facts["status"] == "finished"
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, 31))
    assert [event["message"] for event in run.events() if event["kind"] == "resume"] == ["going on from step 8 of 30"]

"""torch.compile is tried where it can pay, and changes nothing but the speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from genscale.objectives.objective import Objective, Phase
from genscale.recipe.schema import Recipe
from genscale.training import compilation
from genscale.training.compilation import decide_compile, set_compiled
from genscale.training.run import train


class Pair(Objective):
    """Two networks, one of which is differentiated twice."""

    phases = (Phase("discriminator", trains="critic", differentiates_twice=True), Phase("generator", trains="maker"))

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"critic": nn.Linear(2, 2), "maker": nn.Linear(2, 2)})


def is_compiled(network: nn.Module) -> bool:
    return network._compiled_call_impl is not None


def test_a_network_that_is_differentiated_twice_stays_eager() -> None:
    pair = Pair()
    set_compiled(pair, True)
    assert not is_compiled(pair.networks["critic"])
    assert is_compiled(pair.networks["maker"])
    set_compiled(pair, False)
    assert not is_compiled(pair.networks["maker"])


def test_a_short_run_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_median_seconds", lambda measure, device: 0.1)
    pair = Pair()
    assert decide_compile("auto", pair, lambda: None, steps=100, device=torch.device("cpu")) is False
    assert not is_compiled(pair.networks["maker"])


@pytest.mark.parametrize(("compiled_seconds", "pays"), [(0.5, True), (0.99, False)])
def test_a_long_run_keeps_what_the_measurement_shows(
    monkeypatch: pytest.MonkeyPatch, compiled_seconds: float, pays: bool
) -> None:
    times = iter([1.0, compiled_seconds])
    monkeypatch.setattr(compilation, "_median_seconds", lambda measure, device: next(times))
    pair = Pair()
    assert decide_compile("auto", pair, lambda: None, steps=10_000, device=torch.device("cpu")) is pays
    assert is_compiled(pair.networks["maker"]) is pays


@pytest.mark.slow
def test_a_compiled_run_has_the_same_curve(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        settings = {"training.budget": "6 steps", "layout.compile": compiled, "model.layers": 1}
        run = train(recipe(run=str(tmp_path / str(compiled)), **settings), show_progress=False)
        assert run.facts["decisions"]["compile"] is compiled
        curves.append([line["loss"] for line in run.metrics() if "loss" in line])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)

"""The profiler writes a trace of the steps that were asked for, and of no other."""

import gzip
import json
from pathlib import Path

import torch

from genscale.recipe.load import recipe_from_mapping
from genscale.runs.run import Run
from genscale.training.profile import StepProfile


def profiled(folder: Path, window: tuple[int, int] | None, steps: range) -> Path:
    run = Run.create(folder / "run", recipe_from_mapping({"run": str(folder / "run")}), "fingerprint")
    profile = StepProfile(run, window)
    matrix = torch.ones(8, 8)
    for step in steps:
        profile.begin(step)
        matrix @ matrix
        profile.end(step)
    profile.close()
    return run.directory / "trace"


def names(trace: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]


def test_the_window_is_recorded(tmp_path: Path) -> None:
    folder = profiled(tmp_path, (3, 5), range(10))
    assert sorted(file.name for file in folder.iterdir()) == [
        "steps-00000003-00000005.json.gz",
        "steps-00000003-00000005.txt",
    ]
    found = names(folder / "steps-00000003-00000005.json.gz")
    assert found.count("aten::mm") == 3
    assert {name for name in found if name.startswith("step ")} == {"step 3", "step 4", "step 5"}
    assert "aten::mm" in (folder / "steps-00000003-00000005.txt").read_text()


def test_a_run_that_stops_within_the_window_keeps_what_was_recorded(tmp_path: Path) -> None:
    folder = profiled(tmp_path, (3, 50), range(4, 6))
    assert names(folder / "steps-00000004-00000005.json.gz").count("aten::mm") == 2


def test_without_a_window_nothing_is_written(tmp_path: Path) -> None:
    assert not profiled(tmp_path, None, range(3)).exists()

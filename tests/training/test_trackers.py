"""Trackers: what is logged can be read back with each library's own reader, also across a resume."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.training import Trackers
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.training.trackers import open_trackers


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = recipe_from_mapping({"name": "tiny", "model": {"width": 48}, "run": str(tmp_path / "run")})
    return Run.create(tmp_path / "run", recipe, "fingerprint")


def no_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)


def scalars(run: Run, name: str) -> list[tuple[int, float]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard")
    events = reader.EventAccumulator(str(run.directory / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_without_any_nothing_is_written(run: Run) -> None:
    before = sorted(run.directory.iterdir())
    tracker = open_trackers(Trackers(), run)
    tracker.log(1, {"loss": 1.0})
    tracker.text(1, "sample", "hello")
    tracker.close()
    assert sorted(run.directory.iterdir()) == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    no_module(monkeypatch, name)
    with pytest.raises(UserError) as caught:
        open_trackers(Trackers.model_validate({name: True if name == "tensorboard" else "project"}), run)
    assert f"training.trackers.{name}" in str(caught.value)
    assert str(caught.value).endswith(f"pip install 'genscale[{name}]'")


def test_tensorboard_reads_back(run: Run) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    tracker = open_trackers(Trackers(tensorboard=True), run)
    for step in (10, 20):
        tracker.log(step, {"loss": 4.0 - step / 16, "learning_rate": 0.5})
    tracker.log(20, {"validation_loss": 3.0})
    tracker.text(20, "sample", "def f():\n    return '<b>'")
    tracker.close()
    assert scalars(run, "loss") == [(10, 3.375), (20, 2.75)]
    assert scalars(run, "learning_rate") == [(10, 0.5), (20, 0.5)]
    assert scalars(run, "validation_loss") == [(20, 3.0)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    def f():\n        return '<b>'"


def test_tensorboard_forgets_the_steps_that_are_run_again(run: Run) -> None:
    """A resume makes a new writer, a rollback goes back with the same one; both leave one value a step."""
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    first = open_trackers(Trackers(tensorboard=True), run)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0})
    first.close()
    second = open_trackers(Trackers(tensorboard=True), run)
    for step, loss in ((20, 2.0), (30, 2.0), (40, 2.0), (30, 3.0), (40, 3.0)):
        second.log(step, {"loss": loss})
    second.close()
    assert scalars(run, "loss") == [(10, 1.0), (20, 2.0), (30, 3.0), (40, 3.0)]


def test_a_tracker_that_fails_does_not_end_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    tracker = open_trackers(Trackers(tensorboard=True), run)
    tracker.log(1, {"loss": 1.0})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    for step in (2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    (event,) = run.events()
    assert event["kind"] == "warning"
    assert "tensorboard" in event["message"]
    assert "no space left" in event["message"]


def test_mlflow_reads_back_and_a_resumed_run_goes_on_in_the_same_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for steps in ((10, 20), (30,)):
        tracker = open_trackers(Trackers(mlflow="an experiment"), Run.open(run.directory))
        for step in steps:
            tracker.log(step, {"loss": step / 8, "tokens": 100.0 * step})
        tracker.text(steps[-1], "sample", "def f")
        tracker.close()
    from mlflow.tracking import MlflowClient

    facts = Run.open(run.directory).facts["mlflow"]
    client = MlflowClient(tracking_uri=facts["uri"])
    assert [(each.step, each.value) for each in client.get_metric_history(facts["run"], "loss")] == [
        (10, 1.25),
        (20, 2.5),
        (30, 3.75),
    ]
    experiment = client.get_experiment_by_name("an experiment")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["model.width"] == "48"
    assert found.data.tags["mlflow.runName"] == "tiny"
    assert (run.directory / "mlruns").is_dir()
    assert [file.read_text() for file in (run.directory / "mlruns").rglob("step-00000030.txt")] == ["def f"]


def wandb_records(file: Path) -> list[Any]:
    """The records of a ``.wandb`` file: a LevelDB log (chunks: checksum, length, kind) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    content, records, parts, at = file.read_bytes(), [], b"", 7  # the file's own header is 7 bytes
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a chunk's header never crosses a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@pytest.fixture
def wandb() -> Iterator[Any]:
    """The library without what an earlier test left in it."""
    library = pytest.importorskip("wandb", reason="extra wandb")
    library.teardown()
    yield library
    library.teardown()


def test_wandb_offline_reads_back_and_a_resumed_run_keeps_its_id(
    run: Run, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ((10, 20), (20, 30)):  # step 20 is run again, as after a kill
        tracker = open_trackers(Trackers(wandb="a-project"), Run.open(run.directory))
        for step in steps:
            tracker.log(step, {"loss": step / 8})
        tracker.text(steps[-1], "sample", "<script>")
        tracker.close()
    files = sorted(run.directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    found = []
    for file in files:
        records = wandb_records(file)
        (start,) = [record.run for record in records if record.HasField("run")]
        assert (start.run_id, start.project) == (Run.open(run.directory).facts["wandb"]["id"], "a-project")
        config = {update.key: json.loads(update.value_json) for update in start.config.update}
        assert config["model"]["width"] == 48
        for record in records:
            if record.HasField("history"):
                names = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                if "loss" in names:
                    found.append((json.loads(names["step"]), json.loads(names["loss"])))
    assert found == [(10, 1.25), (20, 2.5), (20, 2.5), (30, 3.75)]
    assert [file.read_text() for file in run.directory.glob("wandb/offline-run-*/files/media/html/*.html")] == [
        "<pre>&lt;script&gt;</pre>"
    ] * 2


def test_wandb_without_a_key_says_what_to_do(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb: Any
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(Trackers(wandb="a-project"), run)

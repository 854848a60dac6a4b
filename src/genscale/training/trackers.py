"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

A run that goes on after a stop goes on in the same tracker's run; the ids are kept in the run's facts. These are views
for people: a tracker that fails in mid-run is dropped with a warning in the run's events, and training goes on.
"""

from __future__ import annotations

import html
import importlib.util
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from genscale.recipe.training import Trackers
from genscale.runs.run import Run
from genscale.runtime.errors import UserError


class Tracker(Protocol):
    """One place, or several, that metrics are sent to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics by name, as they are in ``metrics.jsonl``."""

    def text(self, step: int, name: str, text: str) -> None:
        """A sample, or another piece of text."""

    def image(self, step: int, name: str, png: bytes) -> None:
        """A sample, or another picture."""

    def close(self) -> None:
        """Flush, and mark the run as ended."""


def open_trackers(trackers: Trackers, run: Run) -> Tracker:
    """The trackers that the recipe asks for, as one; with none asked for, it does nothing.

    To be called by one process of the run only.

    Raises:
        UserError: a library is not installed (with the line that installs it), or it has no credentials.
    """
    asked: dict[str, Callable[[], Tracker]] = {}
    if trackers.tensorboard:
        asked["tensorboard"] = lambda: _TensorBoard(run)
    if trackers.wandb is not None:
        project = trackers.wandb
        asked["wandb"] = lambda: _WeightsAndBiases(run, project)
    if trackers.mlflow is not None:
        experiment = trackers.mlflow
        asked["mlflow"] = lambda: _MLflow(run, experiment)
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"training.trackers.{name} needs a library that is not here: pip install 'genscale[{name}]'"
            )
    return _Together(run, {name: make() for name, make in asked.items()})


class _Together:
    """Several trackers as one."""

    def __init__(self, run: Run, trackers: dict[str, Tracker]):
        self._run = run
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(step, name, text))

    def image(self, step: int, name: str, png: bytes) -> None:
        self._each(lambda tracker: tracker.image(step, name, png))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # whatever a server or a full disk makes a third party's library raise
                del self._trackers[name]
                self._run.log_event("warning", f"the tracker {name} failed and is not used any more: {error}")


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run directory."""

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = run.directory / "tensorboard"
        self._writer: Any = None
        self._step = 0

    def _at(self, step: int) -> Any:
        """The writer for this step. Where steps begin anew, after a resume or a rollback, the old ones are purged."""
        if self._writer is None or step < self._step:
            if self._writer is not None:
                self._writer.close()
            self._writer = self._open(str(self._folder), purge_step=step if self._folder.exists() else None)
        self._step = step
        return self._writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        block = "\n".join("    " + line for line in text.splitlines())  # Markdown's way to say: as it is
        self._at(step).add_text(name, block, step)

    def image(self, step: int, name: str, png: bytes) -> None:
        self._at(step).add_image(name, _pixels(png), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases:
    """A Weights & Biases run, online or, with ``WANDB_MODE=offline``, in ``wandb/`` of the run directory."""

    def __init__(self, run: Run, project: str):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the library's own reports of its crashes
        import wandb

        self._html, self._image = wandb.Html, wandb.Image
        known = run.facts.get("wandb", {})
        identity = known["id"] if known.get("project") == project else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project,
                name=run.recipe.name,
                notes=run.recipe.description,
                id=identity,
                resume="allow",
                dir=run.directory,
                config=run.recipe.model_dump(mode="json"),
                # nothing is sent but what is logged here: no terminal output, no source code, no git state
                settings=wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True),
            )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"training.trackers.wandb: {error} Or keep it on this machine: set WANDB_MODE=offline"
            ) from None
        # The library refuses steps that go back, as after a resume or a rollback, so the step is a metric of ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        run.record(wandb={"project": project, "id": identity})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>", inject=False), "step": step})

    def image(self, step: int, name: str, png: bytes) -> None:
        self._run.log({name: self._image(_pixels(png)), "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """An MLflow run, at ``MLFLOW_TRACKING_URI`` or in ``mlruns/`` of the run directory."""

    def __init__(self, run: Run, experiment: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database library
            uri = (run.directory.resolve() / "mlruns").as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        try:
            self._client = MlflowClient(tracking_uri=uri)
            known = run.facts.get("mlflow", {})
            if (known.get("uri"), known.get("experiment")) == (uri, experiment):
                self._run = known["run"]
                self._client.update_run(self._run, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(experiment)
                number = found.experiment_id if found else self._client.create_experiment(experiment)
                self._run = self._client.create_run(number, run_name=run.recipe.name).info.run_id
                values = _flat(run.recipe.model_dump(mode="json"))
                self._client.log_batch(self._run, params=[Param(name, text[:6000]) for name, text in values.items()])
        except MlflowException as error:
            raise UserError(f"training.trackers.mlflow at {uri}: {error}") from None
        run.record(mlflow={"uri": uri, "experiment": experiment, "run": self._run})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run, text, f"{name}/step-{step:08}.txt")

    def image(self, step: int, name: str, png: bytes) -> None:
        self._client.log_image(self._run, _pixels(png), f"{name}/step-{step:08}.png")

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _pixels(png: bytes) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"model": {"width": 8}}`` as ``{"model.width": "8"}``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat

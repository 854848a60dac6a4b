"""The run directory: data + recipe + code, and what came of them.

::

    recipe.yaml      the resolved recipe          metrics.jsonl   a line each ``log_every`` steps
    facts.json       data, machine, decisions     events.jsonl    warnings, rollbacks, resumes, the stop
    tokenizer.json   or images.json: the data's   samples.jsonl   what the model wrote or drew, by step
    checkpoints/     to go on from                weights/        plain safetensors to take away
    report.html      one page for people          lock            who is using it

``docs/run-directory.md`` tells each file in full.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from genscale.recipe.load import differences, load_recipe, recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs import journal
from genscale.runs.disk import writing
from genscale.runs.environment import environment
from genscale.runs.lock import locked
from genscale.runtime.errors import UserError
from genscale.runtime.files import write_atomically

FREE = (
    "description",
    "run",
    "data.store",
    "training.checkpoints",
    "training.trackers",
    "training.log_every",
    "training.profile",
    "layout.device",
    "layout.micro_batch",
    "layout.compile",
    "layout.recompute",
    "layout.replicate",
    "layout.shard",
    "layout.tensor",
    "layout.sequence",
    "layout.pipeline",
    "layout.schedule",
    "layout.stages",
    "layout.context",
    "layout.attention",
    "layout.expert",
    "layout.offload",
    "sampling",
)
"""The keys of a recipe that may change when a run goes on, because what is learned does not depend on them."""

_LEFT_BY_A_KILLED_CREATE = re.compile(r"lock|facts\.json|\.(facts\.json|recipe\.yaml)\.\d+\.aside")
_WRITTEN_ASIDE = (
    ".*.json.*.aside",
    ".*.jsonl.*.aside",
    ".recipe.yaml.*.aside",
    "weights/.*.aside",
    "samples/.*.aside",
)


class Run:
    """A run directory. Make one with :meth:`create`, open one with :meth:`open`.

    Attributes:
        directory: the directory.
        recipe: the resolved recipe.
        resumed: whether :meth:`create` found the run already there.
    """

    def __init__(self, directory: Path, recipe: Recipe, facts: dict[str, Any], resumed: bool):
        self.directory = directory
        self.recipe = recipe
        self.resumed = resumed
        self._facts = facts

    @classmethod
    def create(cls, directory: str | Path, recipe: Recipe, data_fingerprint: str, *, holds_lock: bool = False) -> Run:
        """Start a run, or go on with it when the directory holds the same recipe and data.

        A run that never came to its first checkpoint holds nothing yet, and another recipe takes its place.

        Args:
            holds_lock: the caller is within :meth:`lock`.

        Raises UserError, on one line, when the directory holds another run (with the difference), other files, or
        cannot be written.
        """
        directory = Path(directory).expanduser()
        if (directory / "recipe.yaml").exists():
            return cls._go_on(directory, recipe, data_fingerprint, holds_lock)
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory} is a file; the run directory must be a new or an empty folder")
        strangers = [p.name for p in _entries(directory) if not _LEFT_BY_A_KILLED_CREATE.fullmatch(p.name)]
        if strangers:
            raise UserError(
                f"{directory} holds other files ({min(strangers)}) and no recipe.yaml; choose another `run=`"
            )
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        run = cls(directory, recipe, {}, resumed=False)
        with nullcontext() if holds_lock else run.lock():
            if (directory / "recipe.yaml").exists():  # another process was here first
                return cls._go_on(directory, recipe, data_fingerprint, holds_lock=True)
            run._begin(recipe, data_fingerprint)
        return run

    def _begin(self, recipe: Recipe, data_fingerprint: str) -> None:
        self._facts = {}
        self.record(
            data=data_fingerprint,
            store=_absolute_store(recipe),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status="created",
            environment=environment(),
        )
        self._write_recipe(recipe)  # last: a directory is a run from this moment on

    @classmethod
    def _go_on(cls, directory: Path, recipe: Recipe, data_fingerprint: str, holds_lock: bool) -> Run:
        run = cls.open(directory)
        run.resumed = True
        another = _another_run(run, recipe, data_fingerprint)
        if another:
            with nullcontext() if holds_lock or run.has_checkpoint else run.lock():
                if run.has_checkpoint:
                    raise UserError(
                        f"{directory} holds another run: {another}; choose another `run=` or delete that directory"
                    )
                run.resumed = False
                run._begin(recipe, data_fingerprint)
        elif differences(run.recipe, recipe) or run.facts["store"] != _absolute_store(recipe):
            with nullcontext() if holds_lock else run.lock():
                run._write_recipe(recipe)
                run.record(store=_absolute_store(recipe))
        return run

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """An existing run; raises UserError when the directory is none."""
        directory = Path(directory).expanduser()
        if not (directory / "recipe.yaml").is_file():
            what = "has no recipe.yaml" if directory.is_dir() else "is not a directory"
            raise UserError(f"{directory} is no run directory: it {what}; `genscale train RECIPE` makes one")
        recipe, facts = load_recipe(directory / "recipe.yaml"), _read_facts(directory / "facts.json")
        return cls(directory, recipe, facts, resumed=False)

    def _write_recipe(self, recipe: Recipe) -> None:
        path = self.directory / "recipe.yaml"
        with writing(path):
            write_atomically(path, recipe_to_yaml(recipe))
        self.recipe = recipe

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while it is trained; raises UserError when another live process holds it."""
        with locked(self.directory):
            for pattern in _WRITTEN_ASIDE:
                for left_by_a_killed_process in self.directory.glob(pattern):
                    left_by_a_killed_process.unlink()
            yield

    @property
    def has_checkpoint(self) -> bool:
        """Whether training came to its first checkpoint."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the run: data, environment, status, and the decisions that were left to us."""
        return dict(self._facts)

    def record(self, **facts: Any) -> None:
        """Set facts; ``facts.json`` is written anew, atomically."""
        self._facts = {**self._facts, **facts}
        path = self.directory / "facts.json"
        with writing(path):
            write_atomically(path, json.dumps(journal.plain(self._facts), indent=2, ensure_ascii=False) + "\n")

    @property
    def data_fingerprint(self) -> str:
        return self._facts["data"]

    @property
    def store(self) -> Path:
        """The data store that the run was trained on, as recorded."""
        return Path(self._facts["store"])

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def weights(self) -> Path:
        return self.directory / "weights"

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer.json"

    def log_metrics(self, step: int, **values: Any) -> None:
        """Append a line to ``metrics.jsonl``. Non-finite numbers become null."""
        journal.append(self.directory / "metrics.jsonl", {"step": step, **values})

    def metrics(self) -> list[dict[str, Any]]:
        return journal.read(self.directory / "metrics.jsonl")

    def truncate_metrics(self, after_step: int) -> None:
        """Drop metrics and samples of later steps, which are about to be run again, so that none stands there twice."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            journal.keep(self.directory / name, lambda record: record["step"] <= after_step)

    def log_event(self, kind: str, message: str, **values: Any) -> None:
        """Append to ``events.jsonl``: a warning, a rollback, a resume, the stop. Events are history and stay."""
        record = {"time": time.time(), "kind": kind, "message": message, **values}
        journal.append(self.directory / "events.jsonl", record)

    def events(self) -> list[dict[str, Any]]:
        return journal.read(self.directory / "events.jsonl")

    def log_sample(self, step: int, **sample: str) -> None:
        """Append to ``samples.jsonl``."""
        journal.append(self.directory / "samples.jsonl", {"step": step, **sample})

    def keep_image(self, step: int, number: int, png: bytes) -> str:
        """Write ``samples/step-<step>-<number>.png`` and return this path."""
        name = f"samples/step-{step:08d}-{number}.png"
        path = self.directory / name
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, png)
        return name

    def samples(self) -> list[dict[str, Any]]:
        return journal.read(self.directory / "samples.jsonl")


def _another_run(run: Run, recipe: Recipe, data_fingerprint: str) -> str:
    """In what the recipe and the data differ from the run's; the empty string when in nothing that matters."""
    changes = differences(run.recipe, _with_free_keys_of(run.recipe, recipe))
    if changes:
        return "; ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    if run.data_fingerprint != data_fingerprint:
        return f"its data has the fingerprint {run.data_fingerprint}, not {data_fingerprint}"
    return ""


def _absolute_store(recipe: Recipe) -> str:
    return os.path.abspath(os.path.expanduser(recipe.store_directory))


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it is needed to go on with the run") from None
    missing = [name for name in ("data", "store") if name not in facts]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; it is needed to go on with the run")
    return facts


def _with_free_keys_of(recorded: Recipe, recipe: Recipe) -> Recipe:
    """``recipe``, but with the free keys as recorded, so that only differences that matter remain."""
    for key in FREE:
        *path, last = key.split(".")
        part: Any = recorded
        for name in path:
            part = getattr(part, name)
        recipe = _replace(recipe, path, last, getattr(part, last))
    return recipe


def _replace(part: Any, path: list[str], last: str, value: Any) -> Any:
    if not path:
        return part.model_copy(update={last: value})
    return part.model_copy(update={path[0]: _replace(getattr(part, path[0]), path[1:], last, value)})

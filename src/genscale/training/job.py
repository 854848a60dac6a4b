"""Everything that a run needs, put together by :func:`genscale.training.run.train` and used by the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from genscale.objectives.objective import Objective
from genscale.parallel.mesh import Mesh
from genscale.recipe.layout import Axis
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.peak import Peak
from genscale.runtime.progress import TrainingDisplay
from genscale.runtime.stragglers import StragglerWatch
from genscale.runtime.watch import Watch
from genscale.runtime.world import World
from genscale.training.checkpoint import CheckpointStore
from genscale.training.early_stopping import EarlyStopping
from genscale.training.guard import Guard
from genscale.training.inputs import Batches
from genscale.training.interruption import Interruption
from genscale.training.plan import Plan
from genscale.training.profile import StepProfile
from genscale.training.state import TrainingState
from genscale.training.trackers import Tracker


@dataclass
class Progress:
    """Where the run stands: with the state's tensors, all that a resumed run needs."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time in training, over the lives of all its processes."""
    stopped_early: bool = False
    best_step: int | None = None
    best_loss: float | None = None
    exchanged: int = 0
    """Bytes that this process has sent to other groups, where groups train apart."""
    concerns: list[str] = field(default_factory=list)
    """Kinds of concern that were told of."""


@dataclass
class Job:
    """A run in progress."""

    recipe: Recipe
    run: Run
    objective: Objective
    stream: Batches
    validation: Batches
    state: TrainingState
    plan: Plan
    micro_batch: int
    precision: str
    device: torch.device
    world: World
    mesh: Mesh
    peak: Peak
    flops_per_sample: float
    parameters: dict[str, int]
    """Of each network, over all ranks."""
    checkpoints: CheckpointStore
    tracker: Tracker
    display: TrainingDisplay
    interruption: Interruption
    watch: Watch
    stragglers: StragglerWatch
    profile: StepProfile
    preview: Callable[[], list[dict[str, str | bytes]]]
    """Draws the samples that the report shows; called by all ranks, the first one draws."""
    guards: dict[str, Guard]
    """One for each phase."""
    early_stopping: EarlyStopping | None
    progress: Progress = field(default_factory=Progress)
    began: int = 0
    """Steps done when this process began."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what one process writes."""
        return self.world.rank == 0

    @property
    def measured_step(self) -> int | None:
        """The step whose traffic is measured: the process's second, as the first one also sets things up."""
        return self.began + 1 if self.world.size > 1 else None

    @property
    def dropout_offset(self) -> int:
        """Added to the seed of dropout where ranks have different tokens of the same samples."""
        axes: tuple[Axis, ...] = ("context", "tensor") if self.recipe.layout.sequence else ("context",)
        return self.mesh.rank(*axes)

    @property
    def done(self) -> bool:
        """Whether the budget is spent or validation stopped improving."""
        return self.progress.stopped_early or self.progress.step >= self.plan.steps

    def facts(self) -> dict[str, Any]:
        """The JSON side of a checkpoint."""
        return {
            "progress": asdict(self.progress),
            "guards": {name: guard.state() for name, guard in self.guards.items()},
            "early_stopping": self.early_stopping and self.early_stopping.state(),
        }

    def load_facts(self, facts: dict[str, Any]) -> None:
        """Take over what :meth:`facts` gave."""
        self.progress = Progress(**facts["progress"])
        for name, guard in self.guards.items():
            guard.load(facts["guards"][name])
        if self.early_stopping:
            self.early_stopping.load(facts["early_stopping"])

    def event(self, kind: str, message: str, **values: Any) -> None:
        """Say something worth knowing: in the run's events and above the progress display."""
        if self.leads:
            self.run.log_event(kind, message, step=self.progress.step, **values)
            self.display.message(message)

"""From a run directory back to an objective with trained weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch

from genscale.data.description import load_description
from genscale.objectives.build import build_objective
from genscale.objectives.objective import Objective
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import Checkpoint, CheckpointStore
from genscale.training.state import TrainingState, load_controls, load_network, under


def load_objective(
    run: Run, checkpoint: str | int = "best", device: torch.device | str | None = None, alone: bool = False
) -> Objective:
    """The run's objective with the weights of a checkpoint: ``best``, ``last``, or a step.

    Where the run keeps averages, or its optimizer judges other weights than it trains, these are what is loaded.

    Args:
        alone: for this process only; else all ranks of a process group call it.

    Raises:
        UserError: a checkpoint of another name, no such checkpoint, none intact, or made by another model.
    """
    device = device if isinstance(device, torch.device) else pick_device(device or "auto")
    objective = build_objective(run.recipe, load_description(run.directory))
    switches = run.recipe.training.optimizer.kind == "schedule_free"
    loaded = load_checkpoint(
        run,
        checkpoint,
        None if switches else lambda name: name.startswith(("networks.", "averages.", "controls.")),
        alone,
    )
    if switches:
        state = TrainingState(objective, run.recipe, 1, "fp32")
        state.load(loaded.tensors)
        with state.evaluation_weights():
            weights = {name: tensor.clone() for name, tensor in objective.networks.state_dict().items()}
        objective.networks.load_state_dict(weights)
    else:
        for name, network in objective.networks.items():
            weights, averages = (under(loaded.tensors, f"{kind}.{name}.") for kind in ("networks", "averages"))
            load_network(network, weights | averages)  # an average holds the parameters, not the buffers
        load_controls(objective, loaded.tensors)
    return objective.to(device).eval()


def load_checkpoint(
    run: Run, checkpoint: str | int, names: Callable[[str], bool] | None = None, alone: bool = False
) -> Checkpoint:
    """A checkpoint of the run: ``best``, or the last while there is none; ``last``; or a step.

    Args:
        names: chooses the tensors; nothing of the others is read.
        alone: for this process only; else all ranks of a process group call it.

    Raises:
        UserError: a checkpoint of another name, no such checkpoint, or none intact.
    """
    if not isinstance(checkpoint, int) and checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint: expected 'best', 'last' or a step, not '{checkpoint}'")
    store = CheckpointStore(run.checkpoints, alone=alone)
    if not store.steps():
        raise UserError(f"{run.directory} has no checkpoint yet; train it with 'genscale train'")
    if checkpoint == "best" and store.best() is None:
        checkpoint = "last"
    return store.load(cast('Literal["best", "last"] | int', checkpoint), names)

"""From a run directory back to an objective with trained weights."""

from __future__ import annotations

from typing import Literal, cast

import torch

from genscale.data.tokenizer import Tokenizer
from genscale.objectives.build import build_objective
from genscale.objectives.objective import Objective
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.training.checkpoint import CheckpointStore
from genscale.training.state import TrainingState, load_network


def load_objective(run: Run, checkpoint: str | int = "best", device: torch.device | str | None = None) -> Objective:
    """The run's objective with the weights of a checkpoint: ``best``, ``last``, or a step.

    Where the run keeps averages, or its optimizer judges other weights than it trains, these are what is loaded.

    Raises:
        UserError: a checkpoint of another name, no such checkpoint, none intact, or made by another model.
    """
    device = device if isinstance(device, torch.device) else pick_device(device or "auto")
    objective = build_objective(run.recipe, Tokenizer.load(run.directory / "tokenizer.json").size)
    if not isinstance(checkpoint, int) and checkpoint not in ("best", "last"):
        raise UserError(f"checkpoint: expected 'best', 'last' or a step, not '{checkpoint}'")
    store = CheckpointStore(run.checkpoints)
    if not store.steps():
        raise UserError(f"{run.directory} has no checkpoint yet; train it with 'genscale train'")
    if checkpoint == "best" and store.best() is None:
        checkpoint = "last"
    averaged = run.recipe.training.average is not None
    switches = run.recipe.training.optimizer.kind == "schedule_free"
    prefix = "averages." if averaged else "networks."
    which = cast('Literal["best", "last"] | int', checkpoint)
    loaded = store.load(which, None if switches else lambda name: name.startswith(prefix))
    if switches:
        state = TrainingState(objective, run.recipe, 1 if averaged else None, "fp32")
        state.load(loaded.tensors)
        with state.evaluation_weights():
            weights = {name: tensor.clone() for name, tensor in objective.networks.state_dict().items()}
        objective.networks.load_state_dict(weights)
    else:
        for name, network in objective.networks.items():
            own = f"{prefix}{name}."
            load_network(network, {key.removeprefix(own): value for key, value in loaded.tensors.items()})
    return objective.to(device).eval()

"""An average of any length, put together after training (Karras et al. 2024, section 3.2 and algorithm 3).

Averaging is linear in the profile: where a sum of the kept averages' profiles comes close to the profile that is asked
for, the same sum of the averages comes close to the average that would have been tracked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genscale.objectives.objective import Objective
from genscale.recipe.training import PowerAverage as PowerRecipe
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.training.average_snapshots import Snapshot, averages_folder, read_snapshots, snapshots_of
from genscale.training.power_average import PowerAverage, gamma_of
from genscale.training.restore import load_checkpoint, load_objective
from genscale.training.state import load_network, under

Array = NDArray[np.float64]


class Profile(NamedTuple):
    """The density (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]: how much the weights of time tau count."""

    length: float
    """Its standard deviation, relative to t."""
    time: float
    """t, in samples or any other unit that is the same for all."""


class Fit(NamedTuple):
    """A sum of profiles that comes close to another."""

    coefficients: Array
    """(profiles,), which add up to 1."""
    error: float
    """The L2 norm of what is left, relative to the norm of the profile that was to be met."""


class Averaged(NamedTuple):
    """What :func:`average_of` gives."""

    objective: Objective
    error: float
    """Of the profile: see :class:`Fit`."""


def inner_products(left: Sequence[Profile], right: Sequence[Profile]) -> Array:
    """(left, right) integrals of the products of profiles, in closed form (Karras et al. 2024, equation 151)."""
    gamma, other_gamma = (np.array([gamma_of(profile.length) for profile in side]) for side in (left, right))
    time, other_time = (np.array([profile.time for profile in side]) for side in (left, right))
    gamma, time = gamma[:, None], time[:, None]
    # Up to the earlier time both are powers; the later one has come to (earlier / later)^gamma of its height by then.
    earlier, later = np.minimum(time, other_time), np.maximum(time, other_time)
    risen = (earlier / later) ** np.where(time < other_time, other_gamma, gamma)
    heights: Array = (gamma + 1) * (other_gamma + 1) * risen / later
    return heights / (gamma + other_gamma + 1)


def fit(profiles: Sequence[Profile], target: Profile) -> Fit:
    """The least-squares fit to a profile by a sum of others whose coefficients add up to 1.

    Without that constraint the fit would shrink a little, and all weights of the network with it.
    """
    profiles = [profile._replace(time=profile.time / target.time) for profile in profiles]
    target = target._replace(time=1.0)
    products = inner_products(profiles, profiles)
    projections = inner_products(profiles, [target])[:, 0]
    square = inner_products([target], [target])[0, 0]
    # Where the Lagrangian is stationary: products x + multiplier = projections, and sum(x) = 1. It is solved for
    # profiles of unit norm, because narrow and wide ones differ by orders of magnitude.
    unit = np.diag(products) ** -0.5
    system = np.block([[products * np.outer(unit, unit), unit[:, None]], [unit[None, :], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(projections * unit, 1.0), rcond=None)[0]
    coefficients = solution[:-1] * unit
    left = square - 2 * coefficients @ projections + coefficients @ products @ coefficients
    return Fit(coefficients, float(np.sqrt(max(0.0, left) / square)))


def reconstruct(snapshots: Sequence[Snapshot], length: float, at_samples: int) -> dict[str, Tensor]:
    """The average of this length after so many samples, by parameter: float32, summed in float64.

    Args:
        snapshots: of one network. Those taken at ``at_samples`` bring the most.

    Raises:
        UserError: no snapshots, or a length that no profile has.
    """
    return _combined(snapshots, _fit_to(snapshots, length, at_samples))


def average_of(
    run: Run, length: float, checkpoint: str | int = "best", device: torch.device | str | None = None
) -> Averaged:
    """The run's objective with averages of any length for weights, as of a checkpoint: ``best``, ``last``, or a step.

    They are put together from the averages in the checkpoint and the snapshots from before it.

    Raises:
        UserError: the run keeps no power-function averages, a length that no profile has, or what
            :func:`~genscale.training.restore.load_objective` raises.
    """
    kept = run.recipe.training.average
    if not isinstance(kept, PowerRecipe):
        found = f"'{kept.kind}'" if kept else "nothing"
        raise UserError(
            f"{run.directory}: another length needs training.average.kind 'power' while training, not {found}"
        )
    gamma_of(length)  # a mistaken length is told before anything is read
    loaded = load_checkpoint(run, checkpoint, lambda name: name.startswith("averages."))
    objective = load_objective(run, loaded.step, "cpu")
    error = 0.0
    for name in objective.sampled:
        network = objective.networks[name]
        average = PowerAverage(network, kept.lengths)
        average.load(under(loaded.tensors, f"averages.{name}."))
        if average.samples == 0:
            raise UserError(f"{run.directory}: the checkpoint of step 0 is from before any training; take a later one")
        before = read_snapshots(averages_folder(run), name, before=average.samples)
        snapshots = [*before, *snapshots_of(average.snapshot(), average.samples)]
        found_fit = _fit_to(snapshots, length, average.samples)
        load_network(network, network.state_dict() | _combined(snapshots, found_fit))
        error = max(error, found_fit.error)
    device = device if isinstance(device, torch.device) else pick_device(device or "auto")
    return Averaged(objective.to(device), error)


def _fit_to(snapshots: Sequence[Snapshot], length: float, at_samples: int) -> Fit:
    if not snapshots:
        raise UserError("there are no snapshots of averages to put one together from")
    return fit([Profile(each.length, each.samples) for each in snapshots], Profile(length, at_samples))


def _combined(snapshots: Sequence[Snapshot], found: Fit) -> dict[str, Tensor]:
    average = {}
    for name, first in snapshots[0].tensors.items():
        total = torch.zeros_like(first, dtype=torch.float64)
        for coefficient, snapshot in zip(found.coefficients, snapshots, strict=True):
            total.add_(snapshot.tensors[name], alpha=float(coefficient))
        average[name] = total.float()
    return average

"""What every objective is: its networks, its losses, its sampler, and the phases of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from genscale.runtime.randomness import Rng


class Loss(NamedTuple):
    """A total over the valid elements of a micro-batch; the loop divides once, by the global number of them."""

    total: Tensor
    """Scalar, summed over the valid elements, differentiable."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name to (sum, count), reduced over micro-batches and ranks the same way. ``loss`` is always among them."""


@dataclass(frozen=True)
class Phase:
    """One optimizer update within a step."""

    name: str
    trains: str
    """The network that it updates."""
    every: int = 1
    """Steps between two runs of the phase (lazily applied penalties)."""
    differentiates_twice: bool = False


class Objective(nn.Module):
    """What is learned. The training loop runs any objective and never asks which kind it has.

    ``networks`` holds the trained networks by name; the names never change, because they key checkpoints and exports.
    """

    networks: nn.ModuleDict
    phases: tuple[Phase, ...]

    def weight(self, phase: Phase, batch: Any) -> Tensor:
        """Scalar: valid elements of the batch (tokens, images), known before the forward."""
        raise NotImplementedError

    def loss(self, phase: Phase, batch: Any, rng: Rng, scalars: dict[str, float]) -> Loss:
        """The loss of one micro-batch. ``scalars`` are functions of the clock (penalty weights, strengths)."""
        raise NotImplementedError

    def validate(self, batch: Any, rng: Rng) -> Loss:
        """The loss by which runs are compared: no dropout, no smoothing, no penalties, noise fixed by ``rng``."""
        raise NotImplementedError

    def sample(self, request: Any, rng: Rng) -> Any:
        """Draw samples as the request asks."""
        raise NotImplementedError

    def flops_per_sample(self) -> float:
        """Floating-point operations of one sample's forward and backward, without recomputation."""
        raise NotImplementedError


class Denoising(Objective):
    """An objective with one network: something is taken from the data, and the network gives it back.

    Language models (the next token, masked tokens) and diffusion are both this. ``loss`` is prepare, network,
    criterion, so that pipelining and context parallelism can run the three apart.
    """

    phases = (Phase("train", trains="model"),)

    def prepare(self, batch: Any, rng: Rng) -> tuple[dict[str, Any], Any]:
        """From a batch to the network's keyword arguments and the criterion's targets."""
        raise NotImplementedError

    def criterion(self, outputs: Tensor, targets: Any, training: bool = True) -> Loss:
        """From outputs and targets to a summed loss; smoothing and penalties only when training."""
        raise NotImplementedError

    def loss(self, phase: Phase, batch: Any, rng: Rng, scalars: dict[str, float]) -> Loss:
        inputs, targets = self.prepare(batch, rng)
        return self.criterion(self.networks["model"](**inputs), targets)

    def validate(self, batch: Any, rng: Rng) -> Loss:
        inputs, targets = self.prepare(batch, rng)
        return self.criterion(self.networks["model"](**inputs), targets, training=False)

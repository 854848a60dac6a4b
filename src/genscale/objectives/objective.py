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

    def times(self, factor: float) -> Loss:
        """All of it, sums and counts alike, times a factor."""
        if factor == 1:
            return self
        metrics = {name: (total * factor, count * factor) for name, (total, count) in self.metrics.items()}
        return Loss(self.total * factor, metrics)


@dataclass(frozen=True)
class Phase:
    """One optimizer update within a step."""

    name: str
    trains: str
    """The network that it updates."""
    every: int = 1
    """Steps between two runs of the phase (lazily applied penalties)."""
    differentiates_twice: bool = False
    competes: bool = False
    """Its loss need not fall: it rises whenever another phase's network finds something."""


class Objective(nn.Module):
    """What is learned. The training loop runs any objective and never asks which kind it has.

    ``networks`` holds the trained networks by name; the names never change, because they key checkpoints and exports.
    Buffers of the objective itself, outside its networks, are its controls: state that :meth:`observe` adapts, which is
    checkpointed with the weights.
    """

    networks: nn.ModuleDict
    phases: tuple[Phase, ...]
    sampled: tuple[str, ...] = ("model",)
    """The networks that samples come from: these are averaged, where the recipe asks for averages."""

    def weight(self, phase: Phase, batch: Any) -> Tensor:
        """Scalar: valid elements of the batch (tokens, images), known before the forward."""
        raise NotImplementedError

    def scalars(self, progress: float) -> dict[str, float]:
        """What follows the clock (penalty weights, strengths), at ``progress`` from 0 to 1 through the budget."""
        return {}

    def loss(self, phase: Phase, batch: Any, rng: Rng, scalars: dict[str, float]) -> Loss:
        """The loss of one micro-batch. ``scalars`` are what :meth:`scalars` gave for this step."""
        raise NotImplementedError

    def observe(self, measured: dict[str, float], samples: int) -> None:
        """Adapt the controls to a step of ``samples`` samples; ``measured`` is the same on all ranks.

        Args:
            measured: the step's metrics, each name with its phase before it where there are several phases
                (``discriminator_loss``).
        """

    def concerns(self, measured: dict[str, float]) -> dict[str, str]:
        """What a person should look at, by kind: what it is and what to try. Told once for each kind."""
        return {}

    def validate(self, batch: Any, rng: Rng) -> Loss:
        """What runs are compared by: no dropout, no smoothing, no penalties, noise fixed by ``rng``.

        A metric's sum may be a tensor of any shape here; :meth:`scores` makes numbers of the means.
        """
        raise NotImplementedError

    def scores(self, means: dict[str, Tensor]) -> dict[str, float]:
        """From the means over the whole held-out split to numbers; ``loss``, lower is better, is always among them.

        Args:
            means: of each metric of :meth:`validate`, float64.
        """
        return {name: mean.item() for name, mean in means.items()}

    def sample(self, request: Any, rng: Rng) -> Any:
        """Draw samples as the request asks."""
        raise NotImplementedError

    def flops_per_sample(self) -> float:
        """Floating-point operations of one sample's part in a step, all phases, without recomputation."""
        raise NotImplementedError

    def activation_bytes_per_sample(self, element: int) -> int:
        """Bytes kept for the backward of one sample, where an activation's element has ``element`` bytes."""
        raise NotImplementedError

    def rows_per_sample(self) -> int:
        """Rows that a sample adds to the networks' matrix products: tokens, patches, pixels."""
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

    def answer(self, inputs: dict[str, Any]) -> Any:
        """What the criterion compares with the targets."""
        return self.networks["model"](**inputs)

    def score(self, inputs: dict[str, Any], targets: Any, training: bool = True) -> Loss:
        """The loss of what :meth:`prepare` gave. A pipeline takes the place of this."""
        return self.scored(self.answer(inputs), targets, training)

    def scored(self, answer: Any, targets: Any, training: bool = True) -> Loss:
        """This process's part of the loss of an answer: all of it, unless a sequence is shared by several."""
        return self.criterion(answer, targets, training).times(1 / self.sharers)

    takes_parts = False
    """Whether :meth:`scored` can do with the part of each sequence that this process has; else the parts are joined."""
    sharers = 1
    """Processes that share each sequence, of which this is number ``share``."""
    share = 0

    goes_back_again = False
    """Whether the backward of one loss is run in several parts."""

    def split_over(self, share: int, sharers: int) -> None:
        """From now on, this process is one of several that share each sequence."""
        self.share, self.sharers = share, sharers

    def loss(self, phase: Phase, batch: Any, rng: Rng, scalars: dict[str, float]) -> Loss:
        return self.score(*self.prepare(batch, rng))

    def validate(self, batch: Any, rng: Rng) -> Loss:
        return self.score(*self.prepare(batch, rng), training=False)

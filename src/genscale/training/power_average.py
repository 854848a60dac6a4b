"""Averages of a network's weights with power-function profiles (Karras et al. 2024, section 3).

An exponential average of a fixed half-life is too long early in training and too short late. A power-function profile
grows with the run: after t samples, the weights of time tau count in proportion to tau^gamma, so that at any time the
average looks back over the same part of the run. That part, the profile's standard deviation relative to t, is the
average's *length*. Snapshots of averages of two lengths are enough to put together one of any other after training:
:mod:`genscale.training.reconstruction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from genscale.parallel.shards import alike, local
from genscale.runtime.errors import UserError
from genscale.training.average import weights_replaced

LONGEST = 12**-0.5
"""The length at gamma = 0, where all weights since the beginning count alike."""


def gamma_of(length: float) -> float:
    """The exponent of the profile of this length (Karras et al. 2024, algorithm 2).

    The standard deviation of the density proportional to tau^gamma on [0, 1] is (gamma + 1)^(1/2) (gamma + 2)^(-1)
    (gamma + 3)^(-1/2), which makes gamma the largest root of a cubic.

    Raises:
        UserError: a length that is not between 0 and 12^(-1/2), about 0.289; above it, early weights would count most.
    """
    if not 0 < length <= LONGEST:
        raise UserError(f"the length of an average is between 0 and {LONGEST:.3f} of the run, not {length:g}")
    squared = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - squared, 12.0 - squared]).real.max())


class PowerAverage:
    """Averages of the parameters with power-function profiles, in float32 whatever the network's dtype.

    After n samples more, with t seen in all, average <- beta average + (1 - beta) weights, where
    beta = (1 - n / t)^(gamma + 1) (Karras et al. 2024, equation 127). For weights that stay over each step this is
    exactly the integral of tau^gamma weights(tau), normalised; so the first update already forgets the initial weights.
    Buffers are the network's own and are not averaged.

    Args:
        network: its parameters are followed by name.
        lengths: relative standard deviations of the profiles; the network is judged by the first.
    """

    def __init__(self, network: nn.Module, lengths: Sequence[float]):
        self.lengths = tuple(lengths)
        self.samples = 0
        self._gammas = {length: gamma_of(length) for length in lengths}
        self._whole: dict[str, Tensor] = dict(network.named_parameters())
        self._parameters = {name: local(parameter) for name, parameter in self._whole.items()}
        self._averages = {
            length: {name: value.detach().float().clone() for name, value in self._parameters.items()}
            for length in lengths
        }

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Take in the weights as they are after ``samples`` more."""
        self.samples += samples
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        for length, averages in self._averages.items():
            beta = (1 - samples / self.samples) ** (self._gammas[length] + 1)
            torch._foreach_lerp_(list(averages.values()), weights, 1 - beta)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the network holds the averages of the first length; after, exactly the weights of before."""
        with weights_replaced(list(self._parameters.values()), list(self._averages[self.lengths[0]].values())):
            yield

    def snapshot(self) -> dict[str, Tensor]:
        """All averages by ``length/parameter``, live: what is kept for putting together others."""
        return self._by_length(self.lengths)

    @property
    def state(self) -> dict[str, Tensor]:
        """Live, for the checkpoint: ``samples``, the averages of the first length under the parameters' own names, as
        any kind of average has them, and the others by ``length/parameter``."""
        return {**self._by_name(), "samples": torch.tensor(self.samples)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :attr:`state` gave; raises UserError when it is another network's or of other lengths."""
        for name, average in self._by_name().items():
            if name not in tensors or tensors[name].shape != average.shape:
                raise UserError(f"the checkpoint has no average of '{name}' of shape {tuple(average.shape)}")
            local(average).copy_(local(tensors[name]))
        self.samples = int(tensors["samples"])

    def _by_name(self) -> dict[str, Tensor]:
        first, *others = self.lengths
        return {
            name: alike(self._whole[name], average) for name, average in self._averages[first].items()
        } | self._by_length(others)

    def _by_length(self, lengths: Iterable[float]) -> dict[str, Tensor]:
        return {
            f"{each!r}/{name}": alike(self._whole[name], average)
            for each in lengths
            for name, average in self._averages[each].items()
        }

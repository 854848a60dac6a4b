"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genscale.parallel.shards import alike, local
from genscale.runtime.errors import UserError

_RAMP = 0.05
"""The half-life is at most this part of the samples seen, as in the training code of EDM (Karras et al. 2022): early
on, the average looks back over the latest weights only, instead of being dominated by the initial ones."""


class WeightAverage:
    """Average of the parameters with a half-life in samples, in float32 whatever the network's dtype.

    After n samples more, with N seen in all, average <- beta average + (1 - beta) weights, where
    beta = 0.5 ^ (n / min(half_life, 0.05 N)). Buffers are the network's own and are not
    averaged. Of parameters that are split over ranks each rank averages its part.

    Args:
        network: its parameters are followed by name.
        half_life: samples after which weights count half.
    """

    def __init__(self, network: nn.Module, half_life: int):
        self.half_life = half_life
        self.samples = 0
        self._whole: dict[str, Tensor] = dict(network.named_parameters())
        self._parameters = {name: local(parameter) for name, parameter in self._whole.items()}
        self._averages = {name: value.detach().float().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Take in the weights as they are after ``samples`` more."""
        self.samples += samples
        beta = 0.5 ** (samples / min(self.half_life, _RAMP * self.samples))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - beta)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the network holds the averages; after, exactly the weights of before."""
        with weights_replaced(list(self._parameters.values()), list(self._averages.values())):
            yield

    @property
    def state(self) -> dict[str, Tensor]:
        """The averages by parameter, live, and ``samples``: for the checkpoint."""
        averages = {name: alike(self._whole[name], average) for name, average in self._averages.items()}
        return {**averages, "samples": torch.tensor(self.samples)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :attr:`state` gave; raises UserError when it is another network's."""
        for name, average in self._averages.items():
            shape = self._whole[name].shape
            if name not in tensors or tensors[name].shape != shape:
                raise UserError(f"the checkpoint has no average of '{name}' of shape {tuple(shape)}")
            average.copy_(local(tensors[name]))
        self.samples = int(tensors["samples"])


@contextmanager
def weights_replaced(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Within, the parameters have these values; after, exactly their own again. A compiled network stays compiled."""
    if not parameters:
        yield
        return
    originals = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, originals)

"""Randomness that is a pure function of what it is for: no state to save, the same on any machine shape.

Two forms:
- :func:`generator` gives a ``torch.Generator`` keyed by (seed, purpose...), for things drawn once, such as the
  initial weights of a parameter, keyed by its name;
- :class:`Rng` draws per sample, keyed by (seed, step, phase, position of the sample in the global batch), so that
  noise differs between samples and depends neither on the rank nor on the micro-batch that a sample falls in.
"""

from __future__ import annotations

import copy
import hashlib
import math

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the golden-ratio increment of SplitMix64
_MULTIPLIER_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: object) -> int:
    """A 63-bit key from any printable parts; equal parts give an equal key on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator whose stream is a pure function of ``parts``."""
    return torch.Generator().manual_seed(key(*parts))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int64 (torch's ``>>`` keeps the sign)."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on int64 with wrap-around."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


class Rng:
    """Draws for the samples of one micro-batch, each a pure function of (seed, step, phase, position, name).

    Args:
        seed: the recipe's seed.
        step: the training step.
        phase: the phase's name ("train", "validate", "sample", ...).
        positions: (batch,) int64, each sample's position in the global batch; draws come on its device.
    """

    def __init__(self, seed: int, step: int, phase: str, positions: Tensor):
        self.positions, self.step = positions, step
        self._key = key(seed, step, phase)

    def bits(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) int64, 64 random bits each."""
        count = math.prod(shape)
        start = _mix(_mix(self.positions.long() * _GAMMA + self._key) + key(name))  # (batch,)
        counter = torch.arange(1, count + 1, device=self.positions.device) * _GAMMA  # (count,)
        return _mix(start[:, None] + counter).view(len(self.positions), *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) float32 in [0, 1)."""
        return _shift_right(self.bits(name, shape), 40).float() * 2.0**-24

    def spread(self, name: str) -> Tensor:
        """(batch,) float32 in [0, 1): each uniform, together spread evenly over the batch.

        Positions times the golden ratio, shifted by one draw for the step, as VDM (Kingma et al. 2021, appendix I.1)
        spreads its times: less variance than separate draws, and still a function of (seed, step, position) alone.
        """
        common = copy.copy(self)
        common.positions = torch.zeros_like(self.positions[:1])
        places = self.positions * 10_368_890 + common.bits(name)  # golden ratio - 1, in units of 2^-24
        return (places & 0xFFFFFF).float() * 2.0**-24

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) float32, standard normal (Box and Muller 1958)."""
        bits = self.bits(name, shape)
        radius = (_shift_right(bits, 40).float() + 1.0) * 2.0**-24  # (0, 1], so that the logarithm is finite
        angle = ((bits & 0xFFFFFF).float() * 2.0**-24) * (2 * math.pi)
        return torch.sqrt(-2 * radius.log()) * torch.cos(angle)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """(batch, *shape) int64 in [0, high); the bias of the modulus is below high / 2^62."""
        return _shift_right(self.bits(name, shape), 2) % high

    def dropout_seed(self) -> int:
        """A seed for torch's own generator while this micro-batch runs (dropout), keyed by its first sample."""
        return key(self._key, int(self.positions[0]), "dropout")

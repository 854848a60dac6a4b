"""Two traces, tensor by tensor, until one differs.

A tensor differs where the largest absolute difference is more than the tolerance times its largest absolute value.
Two things are rounding and no fault, and are allowed for:

- a gradient that is zero in exact arithmetic (the bias of attention's keys has one) is rounding alone, so that a
  gradient is measured by no less than a part of the largest one in its network;
- an optimizer that divides by the gradient's size makes a whole step of such rounding. A weight may differ by as much
  of its step as its gradient differed by, of itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genscale.planning.trace import Trace

Kind = Literal["activation", "gradient", "weight"]

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the largest gradient in a network: what rounding alone may leave of a smaller one."""
_CAREFUL = 4.0
"""How much more a step may change than the gradients that it is made of, each as a part of itself."""


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same on two layouts."""

    step: int
    """From 1; 0: before the first step."""
    phase: str
    kind: Kind
    name: str
    """As in checkpoints; of an activation, the block's."""
    position: int | None = None
    """Of an activation: in the global batch, of the micro-batch's first sample."""
    call: int | None = None
    """Of an activation: which forward of the block with that micro-batch, from 1."""
    largest: float | None = None
    """Absolute difference; None where there are not two tensors of one shape."""
    scale: float | None = None
    """What it is measured by: the tensor's largest absolute value, on either layout."""
    elements: int | None = None
    """That differ by more than the tolerance."""
    of: int | None = None
    """Elements in all."""
    at: tuple[int, ...] | None = None
    """Where the largest difference is."""
    values: tuple[float, float] | None = None
    """There, on the two layouts."""
    instead: str | None = None
    """What is said where there are not two tensors of one shape."""

    @property
    def where(self) -> str:
        """``step 2, train, samples from 8: the activation networks.model.blocks.0``."""
        place = f"step {self.step}, {self.phase}" if self.step else "before the first step"
        if self.position is not None:
            place += f", samples from {self.position}"
        call = f", call {self.call}," if self.call and self.call > 1 else ""
        return f"{place}: the {self.kind} {self.name}{call}"


class Worst(NamedTuple):
    """The largest difference among tensors of one kind."""

    relative: float = 0.0
    name: str = ""
    step: int = 0


@dataclass
class Comparison:
    """What came of comparing two traces."""

    layout: str
    against: str
    steps: int
    tolerance: float
    compared: dict[Kind, int] = field(default_factory=lambda: {"activation": 0, "gradient": 0, "weight": 0})
    """Tensors of each kind, up to the first that differs."""
    worst: dict[Kind, Worst] = field(default_factory=dict)
    difference: Difference | None = None

    @property
    def agrees(self) -> bool:
        return self.difference is None

    @property
    def as_json(self) -> dict[str, Any]:
        """What is no finite number is null."""
        worst = {kind: each._asdict() for kind, each in self.worst.items()}
        return _finite(asdict(self) | {"agrees": self.agrees, "worst": worst})

    def __str__(self) -> str:
        if self.difference is not None:
            return self._told(self.difference)
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        lines = [f"{self.layout} and {self.against} agree over {steps}, within {self.tolerance:g} of each tensor:"]
        for kind, count in self.compared.items():
            worst = self.worst.get(kind, Worst())
            where = f" in {worst.name}, step {worst.step}" if worst.name else ""
            lines.append(f"  {f'{kind}s':12}{count:8,} compared, largest difference {worst.relative:.1e}{where}")
        return "\n".join(lines)

    def _told(self, found: Difference) -> str:
        if found.largest is None or found.scale is None or found.at is None or found.values is None:
            return f"{found.where} {found.instead}"
        size = f"{found.largest:.3g}, which is {found.largest / found.scale:.2g} of its largest absolute value"
        beyond = f"{found.elements:,} of {found.of:,} elements beyond {self.tolerance:g}"
        here, there = found.values
        return (
            f"{found.where} differs by up to {size} ({found.scale:.3g}), with {beyond}; most at {list(found.at)}: "
            f"{here:.6g} with {self.layout}, {there:.6g} with {self.against}"
        )


def compare(trace: Trace, against: Trace, steps: int, tolerance: float, order: list[str]) -> Comparison:
    """Tensor by tensor, to the first that differs: step by step, activations in the order of the forward, gradients in
    that of the backward, weights.

    Args:
        order: names of all weights, in the order of the forward.
    """
    comparison = Comparison(trace.name, against.name, steps, tolerance)
    both = _Both(trace, against, comparison, {name: place for place, name in enumerate(order)})
    for step in range(steps + 1):
        for phase in dict.fromkeys((*against.phases(step), *trace.phases(step))):
            if both.phase_differs(step, phase):
                return comparison
    return comparison


class _Both:
    """Two traces being compared, and what is remembered from step to step."""

    def __init__(self, trace: Trace, against: Trace, comparison: Comparison, order: dict[str, int]):
        self._traces, self._comparison, self._order = (trace, against), comparison, order
        self._noise: dict[str, Tensor] = {}
        """The largest difference of each element's gradients so far, as a part of them."""
        self._allowed: dict[str, Tensor] = {}
        """By how much each element of a weight may differ for that."""
        self._before: dict[str, tuple[Path, Path]] = {}
        """Where each weight was last written."""

    def phase_differs(self, step: int, phase: str) -> bool:
        return (
            self._activations_differ(step, phase)
            or self._gradients_differ(step, phase)
            or self._weights_differ(step, phase)
        )

    def _activations_differ(self, step: int, phase: str) -> bool:
        here, there = (trace.calls(step, phase) for trace in self._traces)
        for call in dict.fromkeys((*there, *here)):
            position, number, name = call
            place = Difference(step, _plain(phase), "activation", name, position, number + 1)
            if self._lacking(place, call in here, call in there):
                return True
            a, b = (trace.activation(calls[call]) for trace, calls in zip(self._traces, (here, there), strict=True))
            if self._differ(place, a, b):
                return True
        return False

    def _gradients_differ(self, step: int, phase: str) -> bool:
        here, there = (trace.tensors(step, phase, "gradients") for trace in self._traces)
        names = self._sorted({*here, *there})[::-1]
        largest = max(
            (_largest(Trace.read(files[name], name)) for files in (here, there) for name in files), default=0.0
        )
        for name in names:
            place = Difference(step, _plain(phase), "gradient", name)
            if self._lacking(place, name in here, name in there):
                return True
            a, b = Trace.read(here[name], name), Trace.read(there[name], name)
            if self._differ(place, a, b, floor=_ROUNDING * largest):
                return True
            a, b = a.double(), b.double()
            sizes = torch.maximum(a.abs(), b.abs())
            noise = torch.where(sizes > 0, (a - b).abs() / sizes, 0.0)
            self._noise[name] = torch.maximum(noise, self._noise[name]) if name in self._noise else noise
        return False

    def _weights_differ(self, step: int, phase: str) -> bool:
        here, there = (trace.tensors(step, phase, "weights") for trace in self._traces)
        for name in self._sorted({*here, *there}):
            place = Difference(step, _plain(phase), "weight", name)
            if self._lacking(place, name in here, name in there):
                return True
            a, b = Trace.read(here[name], name), Trace.read(there[name], name)
            if name in self._noise and a.shape == b.shape:
                before, before_there = (Trace.read(file, name) for file in self._before[name])
                step_size = max(_largest(a - before), _largest(b - before_there))
                allowed = step_size * (_CAREFUL * self._noise[name]).clamp(max=2.0)
                self._allowed[name] = self._allowed.get(name, torch.zeros(())) + allowed
            self._before[name] = (here[name], there[name])
            if self._differ(place, a, b, allowed=self._allowed.get(name)):
                return True
        return False

    def _sorted(self, names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._order.get(name, len(self._order)), name))

    def _lacking(self, place: Difference, here: bool, there: bool) -> bool:
        if here and there:
            return False
        has, lacks = self._traces if here else self._traces[::-1]
        self._found(place, instead=f"is there with {has.name}, and not with {lacks.name}")
        return True

    def _differ(
        self, place: Difference, a: Tensor, b: Tensor, floor: float = 0.0, allowed: Tensor | None = None
    ) -> bool:
        """Whether two tensors do, which is kept.

        Args:
            floor: a difference that is always allowed.
            allowed: for each element, what does not count.
        """
        comparison = self._comparison
        comparison.compared[place.kind] += 1
        if a.shape != b.shape:
            shapes = " and ".join(f"{tuple(x.shape)} with {t.name}" for x, t in zip((a, b), self._traces, strict=True))
            self._found(place, instead=f"has other shapes: {shapes}")
            return True
        if not a.numel():
            return False
        a, b = a.double(), b.double()
        differences = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities differ by nothing
        differences = torch.where(a.isnan() & b.isnan(), 0.0, differences).nan_to_num(nan=torch.inf)
        counted = differences if allowed is None else (differences - allowed).clamp(min=0.0)
        scale = max(_largest(a), _largest(b), floor / comparison.tolerance)
        beyond = counted > comparison.tolerance * scale
        relative = counted.max().item() / scale if scale else 0.0
        if relative > comparison.worst.get(place.kind, Worst()).relative:
            comparison.worst[place.kind] = Worst(relative, place.name, place.step)
        if not beyond.any():
            return False
        flat = int(counted.argmax())
        at = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), a.shape))
        self._found(
            place,
            largest=differences.flatten()[flat].item(),
            scale=scale,
            elements=int(beyond.sum()),
            of=a.numel(),
            at=at,
            values=(a.flatten()[flat].item(), b.flatten()[flat].item()),
        )
        return True

    def _found(self, place: Difference, **values: Any) -> None:
        told = {name: value for name, value in vars(place).items() if value is not None}
        self._comparison.difference = Difference(**(told | values))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(phase: str) -> str:
    """The phase's name, of its folder's."""
    return phase.partition("-")[2]


def _largest(tensor: Tensor) -> float:
    """Finite absolute value."""
    tensor = tensor.double().abs()
    return torch.where(tensor.isfinite(), tensor, 0.0).max().item() if tensor.numel() else 0.0

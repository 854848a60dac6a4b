"""Muon: momentum, orthogonalised (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

Scaled as by Jordan: the orthogonal update times sqrt(max(1, rows / columns)), which keeps a layer's change of output
about the same for every shape, so that one learning rate serves them all. (Moonshot's 0.2 sqrt(max(rows, columns))
would match AdamW's learning rates instead; the recipe has one for each.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from genscale.parallel.shards import alike, part_of, whole
from genscale.runtime.world import from_rank_0
from genscale.training.precision import pick_precision

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: the steepest at zero, so that five steps bring all singular values to 0.7 - 1.2."""
_STACKED_ELEMENTS = 2**26
"""At most this many elements go through Newton-Schulz at once, which bounds the memory for its intermediates."""


class Form(NamedTuple):
    """How matrices lie in a parameter."""

    rows: tuple[int, ...] = ()
    """Of matrices that are stacked along the rows (query, key and value in one); empty: one matrix."""
    stacked: bool = False
    """One matrix for each index of the first dimension (experts)."""
    split: DTensor | None = None
    """The parameter of which the rank has a part, where it has not the whole."""

    def whole(self, update: Tensor) -> Tensor:
        """Of this rank's part of an update: all of it, as orthogonalising looks at whole matrices."""
        return update if self.split is None else whole(alike(self.split, update))

    def matrices(self, whole: Tensor) -> Sequence[Tensor]:
        """(rows, columns) each, in the same memory."""
        if self.stacked:
            return whole.unbind()
        return whole.flatten(1).split(self.rows or (len(whole),))


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay. A kernel of more than two dimensions is a matrix of its
    output channels by all else.

    Args:
        groups: parameter groups with ``lr`` and ``weight_decay``.
        bits: 16 multiplies in bfloat16, 32 in float32 (:func:`multiplying_bits`). Kept in the checkpoint, so that a run
            that moves to another machine goes on as it began.
        forms: of the parameters, where they are more than one whole matrix each.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        newton_schulz_steps: int,
        bits: int,
        forms: dict[Tensor, Form] | None = None,
    ):
        super().__init__(groups, {"momentum": momentum, "bits": bits, "kept_scalars": ("bits",)})
        self.newton_schulz_steps = newton_schulz_steps
        self.forms = forms or {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            forms = [self.forms.get(parameter, Form()) for parameter in parameters]
            whole_updates = [form.whole(update) for form, update in zip(forms, updates, strict=True)]
            sources = [form.matrices(update) for form, update in zip(forms, whole_updates, strict=True)]
            flat = [matrix for matrices in sources for matrix in matrices]
            directions = iter(orthogonalise(flat, self.newton_schulz_steps, group["bits"]))
            for parameter, form, update, matrices in zip(parameters, forms, whole_updates, sources, strict=True):
                # Where a rank has a part only, the whole step is put together first.
                step = parameter if form.split is None else torch.zeros_like(update)
                for target, _ in zip(form.matrices(step), matrices, strict=True):
                    scale = math.sqrt(max(1.0, target.shape[0] / target.shape[1]))
                    target.add_(next(directions), alpha=-group["lr"] * scale)
                if form.split is not None:
                    parameter.add_(part_of(step, form.split))


def multiplying_bits(device: torch.device) -> int:
    """16 where the device multiplies bfloat16 well (every accelerator, some CPUs), else 32; the same on all ranks."""
    return 16 if device.type != "cpu" or from_rank_0(lambda: pick_precision("auto", device)) == "bf16" else 32


def orthogonalise(matrices: Sequence[Tensor], steps: int, bits: int = 16) -> list[Tensor]:
    """About U V^T of each matrix's singular value decomposition U S V^T; equally shaped ones go through together.

    Args:
        matrices: (rows, columns) each, any shapes.
        steps: of Newton-Schulz.
        bits: 16 or 32; the results' dtype is bfloat16 or float32.
    """
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        shapes[min(rows, columns), max(rows, columns)].append(index)  # the short side first: the smaller products
    results: list[Tensor] = [matrices[0]] * len(matrices)
    for (rows, columns), indices in shapes.items():
        count = max(1, _STACKED_ELEMENTS // (rows * columns))
        for start in range(0, len(indices), count):
            part = indices[start : start + count]
            tall = [matrices[index].shape[0] > rows for index in part]
            stack = torch.stack([matrices[i].mT if flip else matrices[i] for i, flip in zip(part, tall, strict=True)])
            for index, flip, result in zip(part, tall, _newton_schulz(stack, steps, bits).unbind(), strict=True):
                results[index] = result.mT if flip else result
    return results


def _newton_schulz(stack: Tensor, steps: int, bits: int) -> Tensor:
    """Quintic Newton-Schulz on (count, rows, columns) with rows <= columns: X <- a X + (b A + c A^2) X, A = X X^T."""
    a, b, c = _QUINTIC
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (stack / norm.clamp(min=1e-7)).to(torch.bfloat16 if bits == 16 else torch.float32)  # singular values <= 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x

"""The numbers that a run multiplies in: chosen, switched on, and, for fp16, kept from under- and overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from genscale.runtime.peak import matmul_peak

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Of what autocast covers: with fp8 that is all but the layers that cast for themselves (training/low_precision.py)."""


def pick_precision(requested: str, device: torch.device) -> str:
    """``fp32``, ``bf16``, ``fp16`` or ``fp8``; ``auto`` picks what the device multiplies fastest, by its matrix peak.

    On a CPU bf16 where it is at least 1.5 times fp32: half of all CPUs only imitate it. On an accelerator bf16, which
    needs no scaler, unless fp16 is more than twice as fast, as where bf16 is imitated.
    """
    if requested != "auto":
        return requested
    bf16 = matmul_peak(device, torch.bfloat16).flops
    if device.type == "cpu":
        return "bf16" if bf16 >= 1.5 * matmul_peak(device, torch.float32).flops else "fp32"
    return "bf16" if bf16 >= 0.5 * matmul_peak(device, torch.float16).flops else "fp16"


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products in this precision."""
    return _DTYPES.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in ``precision``; weights, gradients and sums stay in float32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, _DTYPES[precision])


class GradientScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2); does nothing in other precisions.

    The scale follows the same rule as torch.amp.GradScaler's: from 2^16, halved by an overflow, doubled by 2000 steps
    without one. But it looks at the gradient norm, which the loop has anyway and which is the same on all ranks,
    instead of searching every gradient again; so the decision needs no communication of its own.
    """

    _GROWTH_INTERVAL = 2000
    _SMALLEST = 2.0**-16

    def __init__(self, precision: str):
        self.enabled = precision == "fp16"
        self.factor = 2.0**16 if self.enabled else 1.0
        self.good_steps = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss * self.factor if self.enabled else loss

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients by the scale, in place: exact, as the scale is a power of two."""
        if self.enabled:
            torch._foreach_mul_(list(gradients), 1.0 / self.factor)

    def overflowed(self, loss: float, gradient_norm: float) -> bool:
        """Adjust the scale by a step's outcome; call once for each backward.

        Returns:
            True when the gradient overflowed because of the scale: the step is to be skipped, and is no fault of the
            model's. A loss that is itself not finite, or a gradient that is not even at the smallest scale, is one, and
            is left to the guard.
        """
        if not self.enabled or not math.isfinite(loss):
            return False
        if math.isfinite(gradient_norm):
            self.good_steps += 1
            if self.good_steps == self._GROWTH_INTERVAL:
                self.factor, self.good_steps = self.factor * 2, 0
            return False
        self.good_steps = 0
        if self.factor <= self._SMALLEST:
            return False
        self.factor /= 2
        return True

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint; empty in other precisions than fp16."""
        if not self.enabled:
            return {}
        return {"factor": torch.tensor(self.factor, dtype=torch.float64), "good_steps": torch.tensor(self.good_steps)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        if self.enabled:
            self.factor = tensors["factor"].item()
            self.good_steps = int(tensors["good_steps"])

"""Where a step's time goes, by category, from torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

# The first pattern that is found in the name of a kernel, or of an operator on a CPU, decides.
_CATEGORIES = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_co|wait_tensor",
    "attention": r"attention|flash|fmha|sdpa",
    "optimizer": r"adam|multi_tensor_apply|_foreach_|lerp",
    "matrix products": r"gemm|cutlass|nvjet|cublas|xmma|wgmma|sm\d\d_|(^|::|_)(b|add|badd)?mm\b|matmul|linear",
    "norms and elementwise": (
        r"norm|elementwise|vectorized|reduce|softmax|gelu|nll|cross_entropy|embedding|copy|cat|fill|zero|triton"
        r"|add|mul|div|sum|sub|sqrt|index|memcpy|memset"
    ),
    "other": r"",
}
CATEGORIES = tuple(_CATEGORIES)


def category(name: str) -> str:
    """Of a kernel or operator."""
    return next(kind for kind, pattern in _CATEGORIES.items() if re.search(pattern, name, re.IGNORECASE))


def milliseconds_by_category(recorded: profile, steps: int) -> dict[str, float]:
    """Of one step: kernels where there is an accelerator, else operators' own time on the CPU."""
    events: Iterable[Any] = recorded.key_averages()
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    totals = dict.fromkeys(CATEGORIES, 0.0)
    for event in kernels or events:
        spent = event.self_device_time_total if kernels else event.self_cpu_time_total
        totals[category(event.key)] += spent / 1000 / steps
    return totals

"""torch.compile where it pays."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from genscale.objectives.objective import Objective
from genscale.parallel.fsdp import units
from genscale.runtime.device import synchronize
from genscale.runtime.world import from_rank_0

# What compiling is taken to cost and to gain before it is tried, so that short runs do not try it.
_COMPILE_SECONDS = 60.0
_EXPECTED_GAIN = {"cpu": 0.08}
_EXPECTED_GAIN_ACCELERATOR = 0.3


def set_compiled(objective: Objective, compiled: bool, by_block: bool = False) -> None:
    """Compile the forward of each trained network, or go back to eager.

    A network that is differentiated twice stays eager: compiled code has no second derivative.

    Args:
        by_block: compile each block by itself, as where ranks exchange something between them.
    """
    if compiled:
        _use_private_cache()
    twice = {phase.trains for phase in objective.phases if phase.differentiates_twice}
    for name, network in objective.networks.items():
        for module in units(network) if by_block else [network]:
            if compiled and name not in twice:
                module.compile(dynamic=False)
            else:
                _uncompile(module)


def _uncompile(network: nn.Module) -> None:
    network._compiled_call_impl = None


def decide_compile(
    requested: bool | Literal["auto"],
    objective: Objective,
    measure: Callable[[], None],
    steps: int,
    device: torch.device,
    by_block: bool = False,
) -> bool:
    """Whether to compile; leaves the networks compiled or not accordingly.

    Args:
        measure: runs one step's forward and backward without changing any weight.
        steps: steps still to come, over which compiling must earn back its cost.
        by_block: compile each block by itself.
    """
    if requested != "auto":
        set_compiled(objective, requested, by_block)
        return requested
    eager = _median_seconds(measure, device)
    gain = _EXPECTED_GAIN.get(device.type, _EXPECTED_GAIN_ACCELERATOR)
    if eager * steps * gain < 2 * _COMPILE_SECONDS:
        return False
    set_compiled(objective, True, by_block)
    pays = _median_seconds(measure, device) < 0.98 * eager
    set_compiled(objective, pays, by_block)
    return pays


def _median_seconds(measure: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        measure()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    # The first call also chooses kernels or compiles. One rank's time for all: they must decide alike.
    return from_rank_0(lambda: sorted(seconds[1:])[2])


def _use_private_cache() -> None:
    """Keep compiled code in a cache of this process alone.

    A process killed while compiling leaves torn files in the shared cache, on which later processes fail.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="genscale-compile-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)

"""The device that the work runs on: chosen, described, waited for, measured."""

from __future__ import annotations

import platform
import resource
from functools import cache
from pathlib import Path
from typing import Any

import torch

from genscale.runtime.errors import UserError, nearest


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the accelerator if there is one, else the CPU; raises UserError for a device that is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        known = ["auto", "cpu", *([accelerator.type] if accelerator else [])]
        raise UserError(
            f"layout.device: '{name}' is no device{nearest(name, known) or f', expected one of {known}'}"
        ) from None
    if device.type not in ("cpu", "meta") and (accelerator is None or accelerator.type != device.type):
        raise UserError(f"layout.device: '{name}' is not on this machine, which has {accelerator or 'the CPU only'}")
    return device


@cache
def processor_name() -> str:
    """The CPU's model name as the system gives it."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What a person would call the device."""
    if device.type == "cpu":
        return processor_name()
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def device_summary(device: torch.device) -> dict[str, Any]:
    """Name, kind and number of threads or devices, for the run's facts."""
    count = torch.get_num_threads() if device.type == "cpu" else torch.accelerator.device_count()
    return {"kind": device.type, "name": device_name(device), "threads" if device.type == "cpu" else "devices": count}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_used(device: torch.device) -> int:
    """Peak bytes: allocated on an accelerator, resident for the process on the CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def memory_free(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return torch.get_device_module(device).mem_get_info(device)[0]


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies matrices in fp8: from capability 8.9 (Ada, Hopper)."""
    if device.type == "cpu":
        return False
    capability = getattr(torch.get_device_module(device), "get_device_capability", lambda _: None)(device)
    return isinstance(capability, tuple) and capability >= (8, 9)

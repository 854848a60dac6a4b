"""The device's matrix peak: known from its data sheet, or measured on it; never guessed."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from genscale.runtime.device import device_name, synchronize

# Dense peaks in FLOP/s from the makers' data sheets, without sparsity: (part of the device's name) -> bf16 and fp16.
_KNOWN_16_BIT = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307e12,
}

# A machine that others use as well shows its peak only now and then.
_MEASURING_SECONDS = 0.6


class Peak(NamedTuple):
    """Floating-point operations per second that matrix multiplication reaches, and how that is known."""

    flops: float
    kind: str
    """``known`` (data sheet) or ``measured`` (the best of several large products, on this device)."""


_measured: dict[tuple[torch.device, torch.dtype], float] = {}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak for products in ``dtype``. Measuring takes about half a second, once for each process."""
    if dtype in (torch.bfloat16, torch.float16):
        for part, flops in _KNOWN_16_BIT.items():
            if part in device_name(device):
                return Peak(flops, "known")
    if (device, dtype) not in _measured:
        _measured[device, dtype] = _measure(device, dtype)
    return Peak(_measured[device, dtype], "measured")


def measured_anew(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak, measured once more where it is measured at all: on a busy device the first time may show too little.

    The larger of all measurements holds.
    """
    before = matmul_peak(device, dtype)
    if before.kind == "measured":
        _measured[device, dtype] = max(before.flops, _measure(device, dtype))
    return matmul_peak(device, dtype)


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    # A CPU that only imitates a dtype would take minutes over the large products that show the peak of one that has it.
    sizes = (64, 256, 1024) if device.type == "cpu" else (8192,)
    flops = 0.0
    for size in sizes:
        if not flops or 2 * size**3 / flops < _MEASURING_SECONDS / 12:
            flops = max(flops, _product_flops(device, dtype, size))
    return flops


def _product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best, begun, attempt = float("inf"), time.perf_counter(), 0
    while attempt < 12 or time.perf_counter() - begun < _MEASURING_SECONDS / 2:
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        attempt += 1
        if attempt > 2:  # the first products also load and choose kernels
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best

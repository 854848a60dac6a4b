"""What a run ran on: versions, machine, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    package = Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of genscale's own source, with ``-dirty`` when it was changed since; None where there is none."""
    if _git("ls-files", "--error-unmatch", "runs/environment.py") is None:  # installed inside another repository
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def environment() -> dict[str, Any]:
    """JSON-ready. The device belongs to the caller, who has chosen it."""
    return {
        "genscale": _version("genscale"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }

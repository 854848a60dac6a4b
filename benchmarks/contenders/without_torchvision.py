"""For packages that import torchvision only to read and write image files.

The registry's build of torchvision breaks against the CPU torch. Here images come as arrays and none is written.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType


def stand_in() -> None:
    """Let ``import torchvision`` succeed; anything of it raises. Call before the package's import."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
        if "." in name:
            setattr(sys.modules["torchvision"], name.split(".")[1], module)

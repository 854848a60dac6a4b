"""What an evaluation of images found: each number beside what real images give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from genscale.reports.charts import number, spoken
from genscale.reports.table import Table

_MEASURE = re.compile(r"(?P<name>[^()]+)\((?P<how>.*)\)")
_FLOOR = ", real)"


def evaluation_table(found: Mapping[str, Any]) -> Table | None:
    """From names such as ``kernel_distance(classifier, N=5000)``, whose floor is named ``...(classifier, N=5000,
    real)``; None where nothing was measured."""
    rows: list[tuple[str, ...]] = []
    for name, value in found.items():
        if name.endswith(_FLOOR):
            continue
        floor = found.get(name[:-1] + _FLOOR)
        parsed = _MEASURE.fullmatch(name)
        measure, how = (parsed["name"], parsed["how"]) if parsed else (name, "")
        rows.append((spoken(measure), how, _written(value), "" if floor is None else _written(floor)))
    return Table(("Measure", "How", "Generated", "Real images"), 2, rows) if rows else None


def _written(value: Any) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

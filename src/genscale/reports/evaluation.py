"""What an evaluation of images found: each number beside what real images give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genscale.reports.charts import number, spoken
from genscale.reports.pictures import Picture, picture
from genscale.reports.table import Table
from genscale.runs.run import Run

_MEASURE = re.compile(r"(?P<name>[^()]+)\((?P<how>.*)\)")
_FLOOR = ", real)"


@dataclass(frozen=True)
class Evaluation:
    """The scores of generated images, as the page shows them."""

    measures: Table
    """Of names that say how they were computed, such as ``kernel_distance(classifier, N=5000)``."""
    rest: list[tuple[str, str]]
    pairs: Picture | None
    """Generated images above, below each the training image that is nearest to it."""


def evaluation(run: Run) -> Evaluation | None:
    """What is recorded of the images that the run's weights drew; None where nothing is."""
    found: Mapping[str, Any] = run.facts.get("image_evaluation") or {}
    if not found:
        return None
    measures: list[tuple[str, ...]] = []
    rest = []
    for name, value in _flat(found):
        parsed = _MEASURE.fullmatch(name)
        if parsed is None:
            rest.append((spoken(name), _written(value)))
        elif not name.endswith(_FLOOR):
            floor = found.get(name[:-1] + _FLOOR)
            measures.append((spoken(parsed["name"]), parsed["how"], _written(value), _written(floor)))
    return Evaluation(
        Table(("Measure", "How", "Generated", "Real images"), 2, measures),
        rest,
        picture(run.directory, "evaluation/closest-pairs.png"),
    )


def _flat(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values, also of mappings inside; lists left out."""
    pairs: list[tuple[str, Any]] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name} ")
        elif not isinstance(value, list):
            pairs.append((prefix + name, value))
    return pairs


def _written(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

"""Curves as scalable drawings: from the lines of ``metrics.jsonl`` to geometry that the page's template lays out.

Which curves share a picture follows from their names and their size, so any objective's metrics are shown: ``loss`` and
``validation_loss`` share one, so do ``discriminator_loss`` and ``generator_loss``, and ``learning_rate`` has its own.
The drawing is an SVG of 1000 by 1000 units that is stretched to its place; labels are text beside it, in per cent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CLOCK = ("step", "samples", "tokens", "seconds", "checkpoint_pause_seconds")
"""Where a line stands; not curves."""
_POINTS = 500
"""At most so many buckets of a curve are drawn, each by its lowest and its highest point."""
_SIZE = 1000.0


@dataclass(frozen=True)
class Curve:
    """One metric over steps."""

    name: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def is_noisy(self) -> bool:
        """Whether a running median shows more: many points, and a good part of them a peak or a trough."""
        slopes = np.sign(np.diff(self.values[np.isfinite(self.values)]))
        return len(slopes) > 60 and float(np.mean(slopes[1:] * slopes[:-1] < 0)) > 0.25

    def smoothed(self) -> Curve:
        """The centred running median over 5 % of the points, which no spike moves, levelled by a mean."""
        buckets = np.array_split(np.arange(len(self.steps)), min(_POINTS, len(self.steps)))
        middles = np.array([_median(self.values[bucket]) for bucket in buckets])
        reach = max(2, round(len(buckets) * 0.025))
        windows = [slice(max(0, k - reach), k + reach + 1) for k in range(len(buckets))]
        medians = np.array([_median(middles[window]) for window in windows])
        values = np.array([medians[window].mean() for window in windows])
        return Curve(self.name, np.array([self.steps[bucket].mean() for bucket in buckets]), values)

    def thinned(self) -> Curve:
        """Every bucket's lowest and highest point, in order: peaks stay, and the points are true ones."""
        if len(self.steps) <= 2 * _POINTS:
            return self
        kept = {0, len(self.steps) - 1}
        for bucket in np.array_split(np.arange(len(self.steps)), _POINTS):
            values = self.values[bucket]
            if np.isfinite(values).any():
                kept |= {int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])}
        chosen = np.array(sorted(kept))
        return Curve(self.name, self.steps[chosen], self.values[chosen])


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


@dataclass(frozen=True)
class Chart:
    """Curves in one picture, with horizontal lines and a marked point."""

    title: str
    curves: tuple[Curve, ...]
    levels: Mapping[str, float] = field(default_factory=dict)
    mark: tuple[int, float, str] | None = None
    """Step, value, label."""


@dataclass(frozen=True)
class Drawing:
    """A chart's geometry. Positions of labels are in per cent of the picture, from its top left corner."""

    title: str
    lines: list[dict[str, Any]]
    """Each: name, colour (a number), role ("raw", "smooth", "line", "points"), path (SVG), last (text)."""
    levels: list[dict[str, Any]]
    mark: dict[str, Any] | None
    x_ticks: list[dict[str, Any]]
    y_ticks: list[dict[str, Any]]
    data: dict[str, Any]
    """What the pointer reads: first and last step, and for each curve its name, colour, steps and values."""
    description: str


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The curves of a run, grouped; losses first, then in the order in which they appear in the file."""
    families: dict[str, list[Curve]] = {}
    curves = _curves(metrics)
    if any(curve.name == "tokens_per_second" for curve in curves):  # the same curve with other numbers
        curves = [curve for curve in curves if curve.name != "samples_per_second"]
    for curve in curves:
        families.setdefault(re.split(r"[_/. ]", curve.name)[-1], []).append(curve)
    grouped = [group for family in families.values() for group in _of_one_size(family)]
    grouped.sort(key=lambda group: not any(curve.name.endswith("loss") for curve in group))
    return [Chart(_title([curve.name for curve in group]), tuple(group)) for group in grouped]


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    points: dict[str, dict[int, float]] = {}
    for line in metrics:
        for name, value in line.items():
            if value is None:  # a number that was not finite, which JSON has no word for
                value = math.nan
            if name not in _CLOCK and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, {})[line["step"]] = float(value)
    return [
        Curve(name, np.array(sorted(curve)), np.array([curve[step] for step in sorted(curve)]))
        for name, curve in points.items()
    ]


def _of_one_size(family: list[Curve]) -> list[list[Curve]]:
    """Curves of one family apart where one is ten times the other: together, the small one would be a flat line."""
    groups: list[tuple[float, list[Curve]]] = []
    for curve in family:
        size = _median(np.abs(curve.values))
        for other, group in groups:
            if max(size, other) <= 10 * min(size, other):  # never for nan: a curve without a finite value stands alone
                group.append(curve)
                break
        else:
            groups.append((size, [curve]))
    return [group for _, group in groups]


def spoken(name: str) -> str:
    """``tokens_per_second`` as ``tokens per second``."""
    return re.sub(r"[_/.]", " ", name)


def _title(names: list[str]) -> str:
    """The words that all the names end in."""
    words = [spoken(name).split() for name in names]
    common: list[str] = []
    for column in zip(*(reversed(each) for each in words), strict=False):
        if len(set(column)) > 1:
            break
        common.insert(0, column[0])
    return " ".join(common or words[0]).capitalize()


def draw(chart: Chart, first: float, last: float) -> Drawing:
    """A chart's geometry for the steps from ``first`` to ``last``."""
    last = max(last, first + 1)
    low, high = _range(chart, first, last)
    margin = 0.03 * (high - low)
    ticks, low, high = _ticks(low - (margin if low else 0.0), high + margin)

    def x(step: float) -> float:
        return _SIZE * (step - first) / (last - first)

    def y(value: float) -> float:
        return _SIZE * (high - value) / (high - low)

    levels: list[dict[str, Any]] = []
    for name, value in sorted(chart.levels.items(), key=lambda level: -level[1]):
        under = bool(levels) and y(value) / 10 - levels[-1]["top"] < 6  # too near the line above for a label between
        levels.append({"name": name, "top": y(value) / 10, "value": number(value), "under": under})
    lines: list[dict[str, Any]] = []
    readable: list[dict[str, Any]] = []
    for colour, curve in enumerate(chart.curves):
        finite = curve.values[np.isfinite(curve.values)]
        roles = [("raw", curve), ("smooth", curve.smoothed())] if curve.is_noisy else [("line", curve)]
        for role, shape in roles:
            thin = shape.thinned()
            lines.append(
                {
                    "name": spoken(curve.name),
                    "colour": colour % 6,
                    "role": role,
                    "path": _path([x(step) for step in thin.steps], [y(value) for value in thin.values]),
                    "points": _dots(thin, x, y) if role == "line" and len(thin.steps) <= 40 else [],
                    "last": number(float(finite[-1])) if len(finite) else "not finite",
                }
            )
        thin = curve.thinned()
        values = [float(f"{value:.6g}") if math.isfinite(value) else None for value in thin.values.tolist()]
        readable.append(
            {"name": spoken(curve.name), "colour": colour % 6, "steps": thin.steps.tolist(), "values": values}
        )
    mark = None
    if chart.mark is not None:
        step, value, label = chart.mark
        mark = {"left": x(step) / 10, "top": y(value) / 10, "label": label}
    return Drawing(
        title=chart.title,
        lines=lines,
        levels=levels,
        mark=mark,
        x_ticks=[
            {"left": x(step) / 10, "label": f"{step:,.0f}"} for step in _ticks(first, last)[0] if first <= step <= last
        ],
        y_ticks=[{"top": y(value) / 10, "label": _tick_label(value, ticks)} for value in ticks],
        data={"first": first, "last": last, "curves": readable},
        description=f"{chart.title} by step: " + ", ".join(f"{each['name']} ends at {each['last']}" for each in lines),
    )


def _range(chart: Chart, first: float, last: float) -> tuple[float, float]:
    """The lowest and the highest value shown. The first 5 % of the steps and the highest 0.5 % of the points may lie
    outside, so that the fall of a loss in its first steps, or one spike, does not flatten all that follows."""
    early = first + 0.05 * (last - first)
    everything = np.concatenate([curve.values for curve in chart.curves])
    later = np.concatenate([curve.values[curve.steps >= early] for curve in chart.curves])
    chosen = later[np.isfinite(later)]
    if len(chosen) < 2:
        chosen = everything[np.isfinite(everything)]
    fixed = [*chart.levels.values(), *([chart.mark[1]] if chart.mark else [])]
    values = np.concatenate([chosen, np.array([value for value in fixed if math.isfinite(value)])])
    if len(values) == 0:
        return 0.0, 1.0
    low = min([float(everything[np.isfinite(everything)].min()), *fixed]) if len(chosen) else float(values.min())
    high = max([float(np.quantile(chosen, 0.995)), *fixed]) if len(chosen) else float(values.max())
    if high <= low:
        return min(0.0, 1.25 * low), max(0.0, 1.25 * low) if low else 1.0
    if 0 < low < 0.12 * high:
        low = 0.0
    return low, high


def _ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """Four to seven round values that cover the range, and the range widened to whole quarters of their distance."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    distance = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    low = math.floor(low / distance * 4 + 1e-9) * distance / 4
    high = math.ceil(high / distance * 4 - 1e-9) * distance / 4
    start = math.ceil(low / distance - 1e-9)
    return [distance * k for k in range(start, math.floor(high / distance + 1e-9) + 1)], low, high


def _tick_label(value: float, ticks: list[float]) -> str:
    largest = max(abs(tick) for tick in ticks)
    for prefix, size, least in (("T", 1e12, 1e12), ("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if largest >= least:
            return f"{value / size:g}{prefix}" if value else "0"
    return f"{value:.4g}" if abs(value) > 1e-9 * largest else "0"


def number(value: float) -> str:
    """A metric's value as it is written in the page: five figures, thousands apart."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:.5g}"


def _dots(curve: Curve, x: Any, y: Any) -> list[dict[str, float]]:
    return [
        {"left": x(step) / 10, "top": y(value) / 10}
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value)
    ]


def _path(across: list[float], down: list[float]) -> str:
    """SVG path data; the pen is lifted over values that are not finite."""
    parts = []
    pen = "M"
    for left, top in zip(across, down, strict=True):
        if math.isfinite(top):
            parts.append(f"{pen}{left:.1f} {min(max(top, -_SIZE), 2 * _SIZE):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)

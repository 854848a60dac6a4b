"""The report of a run: one page that opens anywhere, without a network.

What it shows follows from what the run has: its metrics by their names, its samples by their fields, its facts as they
are. A piece that is missing is left out, so a run that has just begun has a report too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from genscale.recipe.load import recipe_to_yaml
from genscale.reports.charts import Chart, Drawing, charts, draw, number, spoken
from genscale.reports.corpus import corpus
from genscale.reports.evaluation import evaluation
from genscale.reports.pictures import picture
from genscale.runs.run import Run
from genscale.runtime.files import write_atomically
from genscale.runtime.progress import duration

_SAMPLES_PER_STEP = 8
_SAMPLE_CHARACTERS = 2_000
_EVENTS = 200
_SHOWN_APART = (
    "status",
    "stopped_early",
    "best",
    "created",
    "store",
    "inputs",
    "data",
    "baselines",
    "image_evaluation",
    "guard_memory",
)


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page."""

    name: str
    value: str
    remark: str
    how: str
    """How it was computed: a footnote."""


def write_report(run: Run) -> Path:
    """Write ``report.html`` into the run directory, whatever state the run is in, and return its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    metrics, facts = run.metrics(), run.facts
    best = _best(metrics, facts)
    template = Environment(
        loader=PackageLoader("genscale", "reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    ).get_template("report.html.jinja")
    headlines = _headlines(metrics, facts, best)
    page = template.render(
        recipe=run.recipe,
        status=_status(facts),
        subtitle=_subtitle(metrics, facts),
        headlines=headlines,
        drawings=_drawings(metrics, facts, best),
        baselines=facts.get("baselines") or {},
        samples=_samples(run),
        evaluation=evaluation(run),
        corpus=corpus(run),
        events=[_event(event) for event in run.events()[-_EVENTS:]],
        checkpoints=_checkpoints(run),
        facts=list(_flat({name: value for name, value in facts.items() if name not in _SHOWN_APART})),
        yaml=recipe_to_yaml(run.recipe),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(run.report, page.encode("utf-8", errors="replace"))
    return run.report


def _best(metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[int, float] | None:
    """Step and loss of the best validation."""
    recorded = facts.get("best")
    if recorded:
        return recorded["step"], recorded["loss"]
    scored = [(line["validation_loss"], line["step"]) for line in metrics if line.get("validation_loss") is not None]
    return (min(scored)[1], min(scored)[0]) if scored else None


def _status(facts: Mapping[str, Any]) -> str:
    return "stopped early" if facts.get("stopped_early") else str(facts.get("status", "unknown"))


def _subtitle(metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """Date, time spent, place in the budget, device."""
    parts = []
    if "created" in facts:
        parts.append("begun " + datetime.fromisoformat(facts["created"]).strftime("%Y-%m-%d %H:%M %Z"))
    seconds = _last(metrics, "seconds")
    if seconds is not None:
        parts.append(f"{duration(seconds)} of training")
    if metrics:
        parts.append(
            f"step {max(line['step'] for line in metrics):,}" + (f" of {facts['steps']:,}" if "steps" in facts else "")
        )
    device = facts.get("device")
    if isinstance(device, Mapping) and "name" in device:
        parts.append(f"{facts['ranks']} × {device['name']}" if facts.get("ranks", 1) > 1 else str(device["name"]))
    return parts


def _headlines(
    metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], best: tuple[int, float] | None
) -> list[Headline]:
    """The numbers that the run has, each with how it was computed."""
    found: list[Headline] = []
    inputs = facts.get("inputs") or {}
    counts_tokens = bool(facts.get("tokens_per_sample"))
    samples = "images" if inputs.get("images") else "samples"
    if best is not None:
        step, loss = best
        unit = ", nats per token" if counts_tokens else ""
        validations = sum(line.get("validation_loss") is not None for line in metrics)
        how = f"the lowest of {validations} validations on held-out data"
        found.append(Headline("Validation loss", f"{loss:.4f}", f"best, at step {step:,}{unit}", how))
        if counts_tokens:
            if loss < 50:
                found.append(
                    Headline("Perplexity", number(math.exp(loss)), "per token", "e to the best validation loss")
                )
            found += _bits_per_byte(facts, loss)
    elif (loss_now := _last(metrics, "loss")) is not None:
        found.append(
            Headline("Training loss", f"{loss_now:.4f}", "not validated yet", "the last line of metrics.jsonl")
        )
    for name in ("tokens", "samples"):
        seen = _last(metrics, name)
        if seen is not None:
            epoch = inputs.get("tokens", {}).get("train") if name == "tokens" else facts.get("samples_per_epoch")
            remark = f"{seen / epoch:.2f} epochs" if epoch else ""
            kind = samples if name == "samples" else name
            found.append(
                Headline(f"{kind.capitalize()} seen", _short(seen), remark, f"{seen:,} {kind} were trained on")
            )
            break
    if facts.get("parameters"):
        counts = facts["parameters"] if isinstance(facts["parameters"], Mapping) else {"model": facts["parameters"]}
        remark = ", ".join(f"{name} {_short(count)}" for name, count in counts.items()) if len(counts) > 1 else ""
        total = sum(counts.values())
        found.append(
            Headline("Parameters", _short(total), remark, f"{total:,} trained numbers, shared ones counted once")
        )
    for name in ("tokens_per_second", "samples_per_second"):
        rates = [line[name] for line in metrics if line.get(name)]
        if rates:
            kind = samples if name == "samples_per_second" else "tokens"
            how = "the median of the lines of metrics.jsonl, without the time for validation and checkpoints"
            found.append(Headline(f"{kind.capitalize()} per second", f"{median(rates):,.0f}", "median", how))
            break
    return found + _utilisation(metrics, facts)


def _bits_per_byte(facts: Mapping[str, Any], loss: float) -> list[Headline]:
    if facts.get("bits_per_byte"):
        how = "over the whole held-out split, its nats / ln 2 / the bytes of its text, so that tokenizers compare"
        return [Headline("Bits per byte", f"{facts['bits_per_byte']:.4f}", "of held-out text", how)]
    inputs = facts.get("inputs") or {}
    tokens = (inputs.get("tokens") or {}).get("validation")
    size = (inputs.get("bytes") or {}).get("validation")
    if not tokens or not size:
        return []
    bits = loss / math.log(2) * tokens / size
    how = f"validation loss / ln 2 × {tokens:,} tokens / {size:,} bytes of their text, so that tokenizers compare"
    return [Headline("Bits per byte", f"{bits:.4f}", "of held-out text", how)]


def _utilisation(metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Headline]:
    peak = facts.get("peak")
    used = [line["utilisation"] for line in metrics if line.get("utilisation")]
    if not peak or not used:
        return []
    work = f" ({_short(facts['flops_per_sample'], 'FLOP')} for a sample)" if facts.get("flops_per_sample") else ""
    source = {"measured": "measured on this device by matrix products", "known": "from the device's data sheet"}
    how = (
        f"the model's floating-point operations, forward and backward, without recomputation{work}, in a second, "
        f"divided by the matrix peak of {_short(peak['flops'], 'FLOP/s')}, "
        f"{source.get(peak['kind'], peak['kind'])}; the median"
    )
    return [Headline("Utilisation", f"{median(used):.1%}", f"of the {peak['kind']} peak", how)]


def _drawings(
    metrics: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], best: tuple[int, float] | None
) -> list[Drawing]:
    """All curves over the same steps, so that the pointer reads them together."""
    steps = [line["step"] for line in metrics]
    if not steps:
        return []
    shown = [_annotated(chart, facts, best) for chart in charts(metrics)]
    return [draw(chart, min(0, *steps), max(steps)) for chart in shown]


def _annotated(chart: Chart, facts: Mapping[str, Any], best: tuple[int, float] | None) -> Chart:
    """The chart of the validation loss also shows the best one, and the baselines."""
    if not any(curve.name == "validation_loss" for curve in chart.curves):
        return chart
    mark = (best[0], best[1], f"best {best[1]:.4f}") if best else None
    return replace(chart, levels=facts.get("baselines") or {}, mark=mark)


def _samples(run: Run) -> list[dict[str, Any]]:
    """The samples of the first, the middle and the last step that has any, so that one sees them grow better."""
    samples = run.samples()
    steps = sorted({sample["step"] for sample in samples})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [
        {
            "step": step,
            "shown": [_sample(run, each) for each in here[:_SAMPLES_PER_STEP]],
            "more": len(here[_SAMPLES_PER_STEP:]),
        }
        for step in chosen
        for here in [[sample for sample in samples if sample["step"] == step]]
    ]


def _sample(run: Run, sample: Mapping[str, Any]) -> dict[str, Any]:
    shown = picture(run.directory, str(sample["image"])) if "image" in sample else None
    apart = {"step", "prompt", "text", *(["image"] if shown else [])}
    text = str(sample.get("text", ""))
    return {
        "prompt": str(sample.get("prompt", "")),
        "text": text[:_SAMPLE_CHARACTERS] + ("…" if len(text) > _SAMPLE_CHARACTERS else ""),
        "picture": shown,
        "rest": [(spoken(name), str(sample[name])) for name in sample if name not in apart],
    }


def _event(event: Mapping[str, Any]) -> dict[str, str]:
    return {
        "time": datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "step": f"{event['step']:,}" if "step" in event else "",
        "kind": spoken(str(event["kind"])),
        "message": str(event["message"]),
    }


def _checkpoints(run: Run) -> list[dict[str, str]]:
    """The checkpoints and the exported weights that are on the disk."""
    found = []
    for path in [*sorted(run.checkpoints.glob("step-*")), *sorted(run.weights.glob("*.safetensors"))]:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        found.append({"path": str(path.relative_to(run.directory)), "size": _short(size, "B")})
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{spoken(name)} › ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + spoken(name), f"{value:,}" if isinstance(value, int) else number(value)
        elif value is not None:
            yield prefix + spoken(name), str(value)


def _last(metrics: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((line[name] for line in reversed(metrics) if line.get(name) is not None), None)


def _short(value: float, unit: str = "") -> str:
    """``12345678`` as ``12.3 M``, with a unit as ``12.3 MB``: three figures."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()

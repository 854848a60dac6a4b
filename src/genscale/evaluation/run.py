"""Scoring a run on its held-out data: the verb ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genscale.runs.run import Run
from genscale.runtime.errors import UserError


def evaluate(
    run: Run | str | Path, checkpoint: str | int = "best", *, device: str = "auto", **options: Any
) -> dict[str, Any]:
    """Score a checkpoint of a run, as its data asks.

    Args:
        run: the run or its directory. Its data store is needed.
        checkpoint: ``best``, ``last``, or a step.
        options: of :func:`genscale.evaluation.text_evaluation.evaluate_text` (``baseline_tokens``, ``novelty``) or of
            :func:`genscale.evaluation.image_evaluation.evaluate_images` (``count``, ``extractor``,
            ``sampling``, ``seed``, ``on_progress``).

    Returns:
        what these return.

    Raises:
        UserError: no run, store or checkpoint; an option of the other kind of data.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    kind = run.recipe.data.kind
    allowed = _OPTIONS[kind]
    for name in options:
        if name not in allowed:
            raise UserError(f"{name}: not for a run that learned from {kind}; expected one of {', '.join(allowed)}")
    if kind == "images":
        from genscale.evaluation.image_evaluation import evaluate_images

        return evaluate_images(run, checkpoint, device=device, **options)

    from genscale.evaluation.text_evaluation import evaluate_text

    return evaluate_text(run, checkpoint, device=device, **options)


_OPTIONS = {"text": ("baseline_tokens", "novelty"), "images": ("count", "extractor", "sampling", "seed", "on_progress")}

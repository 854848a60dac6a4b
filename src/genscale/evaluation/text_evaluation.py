"""Scoring a language model on its held-out text."""

from __future__ import annotations

import math
from typing import Any

from genscale.data.store import Store
from genscale.data.stream import Stream
from genscale.evaluation.generated_text import evaluate_novelty
from genscale.evaluation.held_out import bits_per_byte, held_out
from genscale.evaluation.kneser_ney import fit_baselines
from genscale.recipe.model import TransformerModel
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.training.precision import autocast
from genscale.training.restore import load_objective

BASELINE_TOKENS = 20_000_000
"""Fitting n-grams to this many tokens takes about 2 GB of memory and 15 seconds."""


def evaluate_text(
    run: Run,
    checkpoint: str | int = "best",
    *,
    device: str = "auto",
    baseline_tokens: int | None = BASELINE_TOKENS,
    novelty: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint and two n-gram baselines on every held-out token.

    The scores are also recorded in the run's facts, for its report, unless the run is in use or cannot be written.

    Args:
        run: its data store is needed.
        checkpoint: ``best``, ``last``, or a step.
        baseline_tokens: fit the baselines to at most this many training tokens; None for all.
        novelty: whether to let the model write, and ask how much of it is copied from the training text.

    Returns:
        ``loss`` (mean nats per token; an upper bound for masked models) and the objective's other metrics;
        ``perplexity``; ``bits_per_byte``; ``tokens``, how many are scored; ``precision`` of the network's products;
        ``baselines``, nats per token on the same tokens by name (``"3-gram"``, or ``"3-gram of 20,000,000 tokens"``
        where that is not all of the training split); ``novelty``, where asked for, as
        :func:`genscale.evaluation.generated_text.evaluate_novelty` gives it; ``recorded``,
        whether the scores are in the facts.

    Raises:
        UserError: no run, no store, no such checkpoint.
    """
    model = run.recipe.model
    assert isinstance(model, TransformerModel)
    place = pick_device(device)
    objective = load_objective(run, checkpoint, place)
    paths = run.facts.get("inputs", {}).get("stores") or [run.store]
    stores = [Store.open(path) for path in paths]
    decisions = run.facts.get("decisions", {})
    precision = decisions.get("precision", "fp32")
    scores: dict[str, Any] = held_out(
        objective,
        Stream(stores, None, "validation", model.context, run.recipe.seed),
        seed=run.recipe.seed,
        batch=decisions.get("micro_batch", 16),
        device=place,
        autocast=lambda: autocast(precision, place),
    )
    tokens = sum(store.tokens("validation") for store in stores)
    scores["perplexity"] = math.exp(scores["loss"])
    scores["bits_per_byte"] = bits_per_byte(scores["loss"], tokens, sum(store.bytes("validation") for store in stores))
    scores["tokens"] = sum(max(0, store.tokens("validation") - 1) for store in stores)
    scores["precision"] = precision
    scores["baselines"] = _baselines(stores, baseline_tokens)
    if novelty:
        scores["novelty"] = evaluate_novelty(objective, stores[0].tokenizer, stores, seed=run.recipe.seed)
    scores["recorded"] = _record(run, checkpoint, scores)
    return scores


def _baselines(stores: list[Store], most: int | None) -> dict[str, float]:
    available = sum(store.tokens("train") for store in stores)
    suffix = "" if most is None or most >= available else f" of {most:,} tokens"
    return {f"{order}-gram{suffix}": loss for order, loss in fit_baselines(stores, (3, 5), most).items()}


def _record(run: Run, checkpoint: str | int, scores: dict[str, Any]) -> bool:
    """Keep the scores with the run; False where another process holds it or it cannot be written."""
    others = {name: value for name, value in scores.items() if name != "baselines"}
    try:
        with run.lock():
            # Read anew, so that what another process recorded meanwhile is kept.
            facts = Run.open(run.directory).facts
            run.record(**facts | {"baselines": scores["baselines"], "held_out": {"checkpoint": checkpoint, **others}})
    except UserError:
        return False
    return True

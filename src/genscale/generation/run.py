"""Sampling from a run directory: texts from a run that learned texts, images from one that learned images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from genscale.data.tokenizer import Tokenizer
from genscale.generation.image_run import sample_images
from genscale.generation.settings import with_overrides
from genscale.generation.text import Completion, generate
from genscale.recipe.data import FileTokenizer, TextData
from genscale.recipe.sampling import TextSampling
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.training.restore import load_objective


def sample(run: Run | str | Path, prompts: Sequence[str] | None = None, **options: Any) -> Any:
    """Draw from a run: a list of completions (:func:`sample_text`) or images (:func:`sample_images`), as it learned.

    Raises:
        UserError: no run, or what these functions raise.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    if run.recipe.data.kind == "text":
        return sample_text(run, prompts, **options)
    if prompts is not None:
        raise UserError(f"prompts: {run.directory} draws images, which have labels, or captions")
    return sample_images(run, **options)


def sample_text(
    run: Run | str | Path,
    prompts: Sequence[str] | None = None,
    *,
    suffix: str | None = None,
    checkpoint: str | int = "best",
    count: int = 1,
    seed: int = 0,
    device: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Write completions with a run's weights.

    Args:
        run: the run or its directory. Its data store is not needed.
        prompts: by default those of the run's recipe, or one empty prompt.
        suffix: text that comes after the completions, for runs that learned to fill in.
        checkpoint: ``best``, ``last``, or a step.
        count: completions of each prompt.
        on_text: see :func:`genscale.generation.text.generate`.
        sampling: keys of the recipe's ``sampling`` that differ from the run's: ``temperature=0.5``, ``tokens=200``, ...

    Raises:
        UserError: no run, no such checkpoint, an unknown or impossible sampling key, a prompt that cannot be encoded.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    data, recorded = run.recipe.data, run.recipe.sampling
    if not isinstance(data, TextData) or not isinstance(recorded, TextSampling):
        raise UserError(f"{run.directory} learned images and writes no text")
    settings = with_overrides(recorded, sampling)
    if count < 1:
        raise UserError(f"count: expected at least 1, not {count}")
    prompts = list(prompts if prompts is not None else settings.prompts) or [""]
    objective = load_objective(run, checkpoint, pick_device(device))
    suffixes = None if suffix is None else [suffix] * len(prompts)
    written = data.tokenizer
    tokenizer = Tokenizer.load(run.tokenizer, written.end_of_document if isinstance(written, FileTokenizer) else None)
    return generate(objective, tokenizer, prompts, settings, count, seed, on_text=on_text, suffixes=suffixes)

"""Writing texts with a language model and asking how new they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genscale.data.store import Store
from genscale.data.tokenizer import Tokenizer
from genscale.evaluation.text_novelty import Novelty, novelty
from genscale.generation.text import generate
from genscale.objectives.objective import Objective
from genscale.recipe.sampling import TextSampling
from genscale.runtime.errors import UserError

VERBATIM = 50
"""Tokens that make a copy (Carlini et al. 2023)."""


def evaluate_novelty(
    objective: Objective,
    tokenizer: Tokenizer,
    stores: Sequence[Store],
    *,
    texts: int = 64,
    tokens: int = 256,
    sampling: TextSampling | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How much of what a model writes unprompted is new, beside held-out text of as many tokens.

    Args:
        stores: what it learned from; every training token is searched.
        texts: how many to write.
        tokens: of each.
        sampling: how; by default at temperature 1, which is the distribution that was learned. ``tokens`` and the
            prompts in it are not used.

    Returns:
        ``novel_ngrams``: for n = 1, 2, ... the share of n-grams that are nowhere in the training tokens, None where
        the texts are shorter; ``verbatim``: the share of tokens within a run of 50 or more that is copied;
        ``mean_match``: tokens of the longest run from a token on that is copied; ``longest_copy`` in tokens and
        ``longest_copy_text``; the same with ``_held_out`` for held-out text, but for the last; ``texts``, how many had
        any tokens; ``tokens``, how many they had in all.

    Raises:
        UserError: the model wrote nothing at all.
    """
    settings = (sampling or TextSampling(temperature=1.0)).model_copy(update={"tokens": tokens})
    completions = generate(objective, tokenizer, [""], settings, texts, seed)
    written = [np.array(tokenizer.encode(completion.text)) for completion in completions if completion.text]
    if not written:
        raise UserError(f"none of {texts} texts has any tokens; raise sampling.tokens or train for longer")
    training = [shard for store in stores for shard in store.shards("train")]
    found = novelty(written, training, run=VERBATIM)
    held_out = _pieces_of([shard for store in stores for shard in store.shards("validation")], written)
    match = found.longest
    copied = written[match.text][match.start : match.start + match.tokens]
    return {
        **_scores(found, ""),
        "longest_copy_text": tokenizer.decode(copied.tolist()),
        **(_scores(novelty(held_out, training, run=VERBATIM), "_held_out") if held_out else {}),
        "texts": len(written),
        "tokens": sum(map(len, written)),
    }


def _scores(found: Novelty, suffix: str) -> dict[str, Any]:
    return {
        f"novel_ngrams{suffix}": [None if np.isnan(share) else share for share in found.novel.tolist()],
        f"verbatim{suffix}": found.verbatim,
        f"mean_match{suffix}": found.mean_match,
        f"longest_copy{suffix}": found.longest.tokens,
    }


def _pieces_of(shards: Sequence[NDArray[np.integer]], like: Sequence[NDArray[np.integer]]) -> list[NDArray[np.integer]]:
    """Pieces of held-out tokens as long as the given texts, spread over the split; shorter where a shard ends."""
    sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
    ends = np.cumsum(sizes)
    pieces = []
    for number, text in enumerate(like):
        start = number * int(sizes.sum()) // len(like)
        shard = int(np.searchsorted(ends, start, side="right"))
        if shard < len(shards):
            inside = start - int(ends[shard] - sizes[shard])
            pieces.append(shards[shard][inside : inside + len(text)])
    return pieces

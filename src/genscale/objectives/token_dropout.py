"""Token dropout: some tokens of the input are replaced by random ones, so that a network leans less on each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.runtime.randomness import Rng


def drop_tokens(tokens: Tensor, rate: float, vocabulary: int, rng: Rng) -> Tensor:
    """Each token, with probability ``rate``, becomes one drawn evenly from the vocabulary.

    Xie et al. 2017 show that this smooths a causal language model, as interpolation with unigrams smooths n-grams. (A
    mask in their place would need an id of its own, in the embedding and in every file that is exported.)

    Args:
        tokens: (batch, time) int64.
        rate: from 0 to 1.
        vocabulary: replacements are below it.
        rng: of these samples.
    """
    time = tokens.shape[1]
    dropped = rng.uniform("token dropout", (time,)) < rate
    return torch.where(dropped, rng.integers("token dropout replacement", vocabulary, (time,)), tokens)

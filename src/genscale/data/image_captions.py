"""Captions as token ids of one length, 0 being the padding: what networks are conditioned on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from genscale.data.tokenizer import Tokenizer, train_bpe


def caption_tokenizer(captions: Iterable[str], vocabulary: int) -> Tokenizer:
    """A BPE of the captions, of at most ``vocabulary`` tokens: fewer where there are few words."""
    return train_bpe(captions, vocabulary, at_most=True)


def caption_ids(tokenizer: Tokenizer, captions: Sequence[str | None], length: int) -> np.ndarray:
    """(captions, length) int64: the ids of each caption plus 1, cut or filled up with 0; all 0 where there is none."""
    ids = np.zeros((len(captions), length), np.int64)
    for row, tokens in zip(ids, tokenizer.encode_batch([caption or "" for caption in captions]), strict=True):
        kept = tokens[:length].astype(np.int64) + 1
        row[: len(kept)] = kept
    return ids

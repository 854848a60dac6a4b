"""BPE dropout: a word is cut in different ways, so that a network learns what its parts are (Provilkov et al. 2020).

The library ``tokenizers`` draws from a generator of its thread that cannot be seeded, so that no store made with it
could be made again. Here each draw is a function of the text's key, the byte and the turn: the same in any process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np

from genscale.data.tokenizer import PATTERN, Tokenizer, byte_characters

LONGEST = 128
"""Bytes. Longer words (rows of dashes, text without spaces) are cut into pieces of this size before they are merged."""

_GROUP = 1 << 17  # bytes of text that are merged at once: few enough for the caches, enough to be worth numpy's calls
_NEVER = np.iinfo(np.int64).max  # the rank of a pair that is no merge
_GAMMA = 0x9E3779B97F4A7C15


class BPEDropout:
    """Encodes as a tokenizer made by :func:`genscale.data.tokenizer.train_bpe`, but leaves out merges at random.

    In each turn (Provilkov et al. 2020, algorithm 1) every possible merge of a word is left out with probability
    ``rate``, and the first in rank of the others is done; the word is finished when none is left. All words of a group
    of texts take their turn at once.

    Args:
        tokenizer: byte-level BPE of that function.
        rate: from 0 to 1; the paper finds 0.1 best for most languages.
        seed: changes what is left out.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int = 0):
        import tokenizers

        self.rate = rate
        self._seed = seed
        self._splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        model = json.loads(tokenizer.content)["model"]
        vocabulary: dict[str, int] = model["vocab"]
        self._byte_tokens = np.array([vocabulary[letter] for letter in byte_characters()])  # (256,)
        self._size = tokenizer.size
        merges = [(vocabulary[left], vocabulary[right]) for left, right in model["merges"]]
        self._merged = np.array([vocabulary[left + right] for left, right in model["merges"]], np.int64)  # by rank
        pairs = np.array([*(left * self._size + right for left, right in merges), _NEVER])
        self._ranks = np.argsort(pairs)  # (merges + 1,) of the pairs in their order; the last pair is none
        self._pairs = pairs[self._ranks]

    def encode_flat(self, texts: Sequence[str], places: Sequence[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`genscale.data.tokenizer.Tokenizer.encode_flat`: (tokens,) uint32 and (texts + 1,) int64.

        Args:
            texts: to encode.
            places: of each text, its document's hash and its first character there; with the text and the seed, they
                alone decide what is left out.
        """
        keys = [_key(self._seed, "bpe dropout", *place) for place in places]
        encoded = [tokens for group in _groups(texts, keys) for tokens in self._encode_group(group)]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(tokens) for tokens in encoded], out=offsets[1:])
        return np.concatenate([*encoded, np.zeros(0, np.uint32)]), offsets

    def _encode_group(self, group: list[tuple[bytes, str, int]]) -> list[np.ndarray]:
        """The tokens of each text of (bytes, the same as text, key)."""
        lengths = np.array([len(raw) for raw, _, _ in group])
        ends = np.cumsum(lengths)
        sizes = [size for _, text, _ in group for size in self._word_sizes(text)]
        words = np.repeat(np.arange(len(sizes)), np.array(sizes, np.int64))  # (bytes,) the number of each byte's word
        keys = np.repeat(np.array([key for _, _, key in group], np.uint64), lengths)
        places = np.arange(len(words)) - np.repeat(ends - lengths, lengths)  # within the text
        seeds = _mix(_mix(keys) + places.astype(np.uint64) * np.uint64(_GAMMA))
        raw = np.frombuffer(b"".join(raw for raw, _, _ in group), np.uint8)
        tokens = self._merge(self._byte_tokens[raw], words, seeds)
        return [part[part >= 0].astype(np.uint32) for part in np.split(tokens, ends[:-1])]

    def _word_sizes(self, text: str) -> Iterator[int]:
        """Bytes of each word, none above LONGEST."""
        for word, _ in self._splitter.pre_tokenize_str(text):
            size = len(word) if word.isascii() else len(word.encode())
            while size > LONGEST:
                yield LONGEST
                size -= LONGEST
            yield size

    def _merge(self, symbols: np.ndarray, words: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Take turns until every word is finished.

        Args:
            symbols: (bytes,) the token of each byte.
            words: (bytes,) the number of its word, never falling.
            seeds: (bytes,) uint64, for the draws about the pair that begins there.

        Returns:
            (bytes,) the token that begins at each byte, -1 where none does.
        """
        finished = np.full(len(symbols), -1)
        places = np.arange(len(symbols))
        ranks = self._rank(symbols, words, places[:-1])  # of each token with the next one
        ranks = np.append(ranks, _NEVER)
        for turn in itertools.count(1):
            possible = np.flatnonzero(ranks != _NEVER)
            draws = _mix(seeds[places[possible]] + np.uint64(turn * _GAMMA % (1 << 64))) >> np.uint64(11)
            possible = possible[draws * 2.0**-53 >= self.rate]
            if not len(possible):
                break
            # Of each word the merge of the lowest rank, and among equals the first.
            firsts = np.flatnonzero(np.diff(words[possible], prepend=-1))
            best = np.minimum.reduceat(ranks[possible] * len(ranks) + possible, firsts) % len(ranks)
            symbols[best] = self._merged[ranks[best]]
            going_on = np.zeros(words[-1] + 1, bool)
            going_on[words[best]] = True
            kept = going_on[words]
            done = ~kept
            finished[places[done]] = symbols[done]
            kept[best + 1] = False
            best = np.cumsum(kept)[best] - 1  # where the merged tokens are among those kept
            symbols, words, places, ranks = symbols[kept], words[kept], places[kept], ranks[kept]
            ranks[best] = self._rank(symbols, words, best)
            before = best[best > 0] - 1
            ranks[before] = self._rank(symbols, words, before)
        finished[places] = symbols
        return finished

    def _rank(self, symbols: np.ndarray, words: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The ranks of merging the tokens at ``first`` with the next of their words."""
        second = np.minimum(first + 1, len(symbols) - 1)
        pairs = symbols[first] * self._size + symbols[second]
        found = np.searchsorted(self._pairs, pairs)
        is_merge = (self._pairs[found] == pairs) & (words[first] == words[second]) & (first != second)
        return np.where(is_merge, self._ranks[found], _NEVER)


def _key(*parts: object) -> int:
    """64 bits, a pure function of ``parts``."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def _groups(texts: Sequence[str], keys: Sequence[int]) -> Iterator[list[tuple[bytes, str, int]]]:
    """Texts that are merged at once, with their bytes and keys."""
    group: list[tuple[bytes, str, int]] = []
    size = 0
    for text, key in zip(texts, keys, strict=True):
        raw = text.encode()
        group.append((raw, text, key))
        size += len(raw)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _mix(bits: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, figure 17), on uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

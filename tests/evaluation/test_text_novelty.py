from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from genscale.evaluation.text_novelty import longest_matches, novelty


def naive(texts: Sequence[np.ndarray], training: Sequence[np.ndarray], longest: int) -> list[int]:
    """The longest run from each token on that is somewhere in training, found by looking everywhere."""
    spaced = [" " + " ".join(map(str, shard.tolist())) + " " for shard in training]

    def occurs(run: list[int]) -> bool:
        return any(" " + " ".join(map(str, run)) + " " in shard for shard in spaced)

    found = []
    for text in texts:
        tokens = text.tolist()
        for start in range(len(tokens)):
            n = 0
            while n < longest and start + n < len(tokens) and occurs(tokens[start : start + n + 1]):
                n += 1
            found.append(n)
    return found


def draw(seed: int, tokens: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocabulary, size=tokens).astype(np.uint16)


@pytest.mark.parametrize("vocabulary", [2, 5, 60])
@pytest.mark.parametrize("piece", [1, 37, 1000])
def test_longest_matches_are_those_of_looking_everywhere(vocabulary: int, piece: int) -> None:
    training = [draw(0, 300, vocabulary), draw(1, 120, vocabulary)]
    texts = [draw(2, 40, vocabulary), training[0][200:260], draw(3, 1, vocabulary), training[1][-20:]]
    matches, places = longest_matches(texts, training, 50, piece)
    assert matches.tolist() == naive(texts, training, 50)
    everything, tokens = np.concatenate(training), np.concatenate(texts)
    for start, (match, place) in enumerate(zip(matches.tolist(), places.tolist(), strict=True)):
        assert (place == -1) == (match == 0)
        np.testing.assert_array_equal(everything[place : place + match] if match else [], tokens[start : start + match])


def test_tokens_that_training_alone_has_do_no_harm() -> None:
    training, texts = [np.array([70_000, 1, 2, 70_000, 3], dtype=np.uint32)], [np.array([1, 2, 3])]
    assert longest_matches(texts, training, 5)[0].tolist() == [2, 1, 1]


def test_a_copy_is_verbatim_and_a_new_text_is_not() -> None:
    training = [draw(0, 5000, 500)]
    copied = training[0][1000:1100]
    texts = [draw(1, 100, 500), np.concatenate([draw(2, 30, 500), copied, draw(3, 70, 500)])]
    found = novelty(texts, training, run=50)
    assert found.verbatim == pytest.approx(100 / 300, abs=0.02)
    text, start, tokens, place = found.longest
    assert text == 1
    assert 28 <= start <= 30  # a token or two before or after may match by chance
    assert 100 <= tokens <= 104
    np.testing.assert_array_equal(training[0][place : place + tokens], texts[1][start : start + tokens])
    assert novelty(texts[:1], training, run=50).verbatim == 0


def test_runs_shorter_than_asked_are_no_copies() -> None:
    training = [draw(0, 5000, 500)]
    text = [np.concatenate([draw(1, 50, 500), training[0][:40], draw(2, 50, 500)])]
    assert novelty(text, training, run=50).verbatim == 0
    assert novelty(text, training, run=40).verbatim == pytest.approx(40 / 140, abs=0.02)


def test_the_curve_counts_ngrams_that_are_nowhere_in_training() -> None:
    training, texts = [draw(0, 2000, 12)], [draw(1, 300, 12), draw(2, 5, 12)]
    found = novelty(texts, training, orders=8)
    assert np.isfinite(found.novel).all()
    shard = training[0].tolist()
    for n in range(1, 9):
        known = {tuple(shard[i : i + n]) for i in range(len(shard) - n + 1)}
        grams = [tuple(text.tolist()[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        assert found.novel[n - 1] == pytest.approx(np.mean([gram not in known for gram in grams]))
    assert found.novel[0] == 0
    assert (np.diff(found.novel) >= 0).all()


def test_texts_shorter_than_n_leave_the_curve_open() -> None:
    found = novelty([np.array([1, 2])], [np.array([1, 2, 3])], orders=4)
    assert found.novel[:2].tolist() == [0, 0]
    assert np.isnan(found.novel[2:]).all()


def test_a_text_of_unknown_tokens_matches_nothing() -> None:
    found = novelty([np.array([9, 9])], [np.array([1, 2, 3])])
    assert found.novel[0] == 1
    assert found.longest == (0, 0, 0, -1)
    assert found.mean_match == 0


def test_memory_does_not_grow_with_the_training_tokens(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "tokens.npy"  # type: ignore[operator]
    np.save(path, draw(0, 2_000_000, 1000))
    shard = np.load(path, mmap_mode="r")
    tracemalloc.start()
    novelty([draw(1, 200, 1000)], [shard], piece=1 << 14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # the tokens alone are 4 MB, as int64 16 MB


def test_the_longest_run_followed_covers_what_is_asked() -> None:
    with pytest.raises(ValueError, match="must be at least"):
        novelty([np.array([1])], [np.array([1])], run=50, longest=20)

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from genscale.evaluation.kneser_ney import KneserNey, count, fit_baselines


def textbook(tokens: list[int], order: int, vocabulary: int) -> tuple[Callable[[int, tuple[int, ...]], float], int]:
    """Modified Kneser-Ney straight from Chen and Goodman, with dictionaries; and how often the discounts fell back."""
    raw = {n: Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, order + 1)}
    counts = {order: dict(raw[order])}
    for n in range(1, order):
        preceding: dict[tuple[int, ...], set[int]] = {gram: set() for gram in raw[n]}
        for gram in raw[n + 1]:
            preceding[gram[1:]].add(gram[0])
        counts[n] = {gram: len(before) for gram, before in preceding.items()}
    discounts, fallbacks = {}, 0
    for n, table in counts.items():
        n1, n2, n3, n4 = (sum(c == size for c in table.values()) for size in (1, 2, 3, 4))
        estimates = None
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if estimates is None or not all(0 <= d <= size for size, d in enumerate(estimates, 1)):
            estimates, fallbacks = (0.5, 1.0, 1.5), fallbacks + 1
        discounts[n] = (0.0, *estimates)

    def probability(token: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        lower = probability(token, context[1:]) if context else 1 / vocabulary
        following = [counts[n].get((*context, other), 0) for other in range(vocabulary)]
        total = sum(following)
        if total == 0:
            return lower
        discount = [discounts[n][min(c, 3)] for c in following]
        return (following[token] - discount[token]) / total + sum(discount) / total * lower

    return probability, fallbacks


def random_text(size: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Tokens with a law of few frequent and many rare ones, and some repetition, so that all counts occur."""
    generator = np.random.default_rng(seed)
    words = [generator.zipf(1.3, generator.integers(2, 6)) % vocabulary for _ in range(max(1, size // 12))]
    picks = np.minimum(generator.zipf(1.4, size // 2) - 1, len(words) - 1)
    return np.concatenate([words[pick] for pick in picks])[:size]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "vocabulary"), [(900, 40), (200, 12), (60, 7), (4, 3)])
def test_equals_a_textbook_implementation(order: int, size: int, vocabulary: int) -> None:
    tokens = random_text(size, vocabulary)
    held_out = np.concatenate([random_text(max(20, size // 5), vocabulary, seed=1), tokens[:5]])
    probability, _ = textbook(tokens.tolist(), order, vocabulary)
    sequence = held_out.tolist()
    expected = [
        math.log(probability(sequence[i], tuple(sequence[max(0, i - order + 1) : i]))) for i in range(1, len(sequence))
    ]
    model = KneserNey(order, vocabulary).fit(tokens.astype(np.uint16))
    np.testing.assert_allclose(model.log_probabilities(held_out), expected, atol=1e-10, rtol=0)
    assert model.loss(held_out) == pytest.approx(-np.mean(expected), abs=1e-10)


def test_the_comparison_covers_estimated_discounts() -> None:
    assert textbook(random_text(900, 40).tolist(), 3, 40)[1] == 0
    assert textbook(random_text(60, 7).tolist(), 3, 7)[1] > 0


def test_a_case_computed_by_hand() -> None:
    # Bigrams 01, 10, 02, once each: discounts fall back to 0.5, and each of 0, 1, 2 continues one token. A unigram seen
    # has (1 - 0.5) / 3 + 0.5 / 4 = 7/24, token 3 has 0.5 / 4 = 1/8. After 0 (total 2), half of the mass backs off.
    model = KneserNey(2, 4).fit(np.array([0, 1, 0, 2]))
    expected = [0.25 + 0.5 * 7 / 24, 0.5 + 0.5 * 7 / 24, 0.5 / 8, 1 / 8, 7 / 24]  # 1|0, 0|1, 3|0, 3|3, 2|3
    np.testing.assert_allclose(np.exp(model.log_probabilities(np.array([0, 1, 0, 3, 3, 2]))), expected, rtol=1e-12)
    # Nothing followed 2 in training: the unigrams stand.
    np.testing.assert_allclose(np.exp(model.log_probabilities(np.array([2, 1]))), [7 / 24], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_in_any_context(order: int) -> None:
    tokens = random_text(2000, 30)
    model = KneserNey(order, 31).fit(tokens)  # token 30 never occurs
    contexts = [tokens[i : i + 4] for i in (0, 500, 1996)] + [np.array(c) for c in ([30, 1, 2, 3], [5, 30, 30, 30])]
    for context in contexts:
        ends = [model.log_probabilities(np.append(context, token))[-1] for token in range(31)]
        assert math.fsum(np.exp(ends)) == pytest.approx(1, abs=1e-12)


def test_unseen_tokens_share_the_uniform_base_evenly() -> None:
    tokens = random_text(2000, 30)
    model = KneserNey(3, 50).fit(tokens)
    unseen = [model.log_probabilities(np.array([1, 2, token]))[-1] for token in range(30, 50)]
    assert np.ptp(unseen) == 0
    assert np.isfinite(unseen[0])


def test_shards_are_one_sequence() -> None:
    tokens, held_out = random_text(3000, 30), random_text(300, 30, seed=1)
    whole = KneserNey(4, 30).fit(tokens).loss(held_out)
    shards = np.split(tokens, [1, 2, 900, 900, 2500])
    assert KneserNey(4, 30).fit(shards).loss(np.split(held_out, [7])) == whole


def test_large_vocabularies_count_the_same() -> None:
    # Beyond 63 bits for a key with its place, sorting takes another way.
    tokens = random_text(3000, 30)
    small = count(tokens, 3, 30)
    large = count(tokens, 3, 1 << 50)
    for one, other in zip(small, large, strict=True):
        np.testing.assert_array_equal(one.occurrences, other.occurrences)
        np.testing.assert_array_equal(one.continuations, other.continuations)


def test_finds_the_entropy_of_a_source_of_its_own_order() -> None:
    generator = np.random.default_rng(0)
    table = generator.dirichlet(np.full(8, 0.3), size=(8, 8))  # (before last, last, next)
    draws = generator.random(120_000)
    edges = table.cumsum(-1)
    tokens = [0, 0]
    for draw in draws:
        tokens.append(min(7, int(np.searchsorted(edges[tokens[-2], tokens[-1]], draw))))
    training, held_out = np.array(tokens[:100_000]), np.array(tokens[100_000:])
    true = -np.log(table[held_out[:-2], held_out[1:-1], held_out[2:]]).mean()
    losses = {order: KneserNey(order, 8).fit(training).loss(held_out) for order in (1, 2, 3)}
    assert true < losses[3] < true + 0.02
    assert losses[3] < losses[2] - 0.1
    assert losses[2] < losses[1] - 0.05


def fake_store(training: np.ndarray, held_out: np.ndarray) -> SimpleNamespace:
    shards = {"train": np.array_split(training, 3), "validation": [held_out]}
    return SimpleNamespace(shards=shards.__getitem__, tokenizer=SimpleNamespace(size=30))


def test_baselines_of_several_orders_equal_models_fitted_alone() -> None:
    training, held_out = random_text(5000, 30), random_text(500, 30, seed=1)
    losses = fit_baselines(fake_store(training, held_out), (3, 5))  # type: ignore[arg-type]
    assert losses == {order: KneserNey(order, 30).fit(training).loss(held_out) for order in (3, 5)}


def test_baselines_fit_all_stores_and_score_each_of_them() -> None:
    parts = [random_text(size, 30, seed) for seed, size in enumerate((3000, 200, 2000, 300))]
    stores = [fake_store(parts[0], parts[1]), fake_store(parts[2], parts[3])]
    model = KneserNey(3, 30).fit([parts[0], parts[2]])
    total = sum(model.log_probabilities(part).sum() for part in (parts[1], parts[3]))
    assert fit_baselines(stores, [3])[3] == pytest.approx(-total / (199 + 299))  # type: ignore[arg-type]


def test_baselines_can_be_fitted_to_the_first_tokens_only() -> None:
    training, held_out = random_text(5000, 30), random_text(500, 30, seed=1)
    limited = fit_baselines(fake_store(training, held_out), [3], most_tokens=2500)  # type: ignore[arg-type]
    assert limited[3] == KneserNey(3, 30).fit(training[:2500]).loss(held_out)

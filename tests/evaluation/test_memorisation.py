from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from genscale.evaluation.memorisation import Memorisation, memorisation, rank_test


def draw(seed: int, images: int, width: int = 8) -> np.ndarray:
    """From ten clusters, as images of ten classes are."""
    means = 4 * np.random.default_rng(99).normal(size=(10, width))
    random = np.random.default_rng(seed)
    return means[random.integers(10, size=images)] + random.normal(size=(images, width))


def look(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, **options: int) -> Memorisation:
    parts = np.array_split(training, 7)
    return memorisation(generated, held_out, iter(parts), training[::2], **options)


TRAINING, HELD_OUT = draw(0, 3000), draw(1, 600)


def test_fresh_samples_are_not_suspicious() -> None:
    found = [look(draw(seed, 400), TRAINING, HELD_OUT) for seed in range(10, 18)]
    assert not any(each.suspicious for each in found)
    assert np.mean([each.nearest_is_training for each in found]) == pytest.approx(3000 / 3600, abs=0.02)
    assert np.mean([each.closer_than_held_out for each in found]) == pytest.approx(0.5, abs=0.03)
    assert all(abs(each.copying_statistic) < 4 for each in found)


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("part", [0.1, 1.0])
def test_copies_are_suspicious(noise: float, part: float) -> None:
    random = np.random.default_rng(3)
    generated = draw(20, 400)
    copied = int(part * 400)
    generated[:copied] = TRAINING[random.permutation(3000)[:copied]] + noise * random.normal(size=(copied, 8))
    found = look(generated, TRAINING, HELD_OUT)
    assert found.suspicious
    assert found.replicas > 0.8 * part
    assert found.replicas_held_out < 0.02
    if part == 1:
        assert found.copying_statistic < -8
        assert found.nearest_is_training == 1
        assert found.closer_than_held_out > 0.99


def test_a_generator_that_leans_on_training_images_without_copying_them_is_suspicious() -> None:
    """Blurred copies are no replicas, yet nearer to training images than chance."""
    random = np.random.default_rng(4)
    found = look(TRAINING[:1000] + 0.5 * random.normal(size=(1000, 8)), TRAINING, HELD_OUT)
    assert found.nearest_is_training_z > 3
    assert found.suspicious


def test_typical_images_are_not_taken_for_copies() -> None:
    """As guidance does: nearer to the middle of their class, so nearer to training images, but to held-out ones too."""
    means = 4 * np.random.default_rng(99).normal(size=(10, 8))
    random = np.random.default_rng(5)
    generated = means[random.integers(10, size=400)] + 0.4 * random.normal(size=(400, 8))
    found = look(generated, TRAINING, HELD_OUT)
    assert found.copying_statistic < -3
    assert not found.suspicious


def test_images_of_nothing_like_the_data_are_far_rather_than_copied() -> None:
    found = look(40 + draw(6, 400), TRAINING, HELD_OUT)
    assert found.copying_statistic > 3 or np.isnan(found.copying_statistic)
    assert found.closer_than_held_out < 0.01
    assert not found.suspicious


def test_duplicates_in_the_data_are_the_floor_of_replicas() -> None:
    """Where held-out images are themselves near-duplicates of training images, replicas are no news."""
    random = np.random.default_rng(7)
    held_out = np.concatenate([HELD_OUT[:300], TRAINING[:300] + 0.01 * random.normal(size=(300, 8))])
    generated = np.concatenate([draw(8, 200), TRAINING[500:700] + 0.01 * random.normal(size=(200, 8))])
    found = look(generated, TRAINING, held_out)
    assert found.replicas_held_out == pytest.approx(0.5, abs=0.02)
    assert abs(found.replicas_z) < 3


def test_z_is_that_of_random_splits_of_the_real_images() -> None:
    real, generated = draw(30, 330), draw(31, 500)
    rates = []
    for seed in range(150):
        order = np.random.default_rng(seed).permutation(330)
        split = look(generated, real[order[:300]], real[order[300:]], cells=1)
        rates.append(split.nearest_is_training)
    stated = (split.nearest_is_training - split.nearest_is_training_expected) / split.nearest_is_training_z
    assert np.mean(rates) == pytest.approx(300 / 330, abs=4 * np.std(rates) / 150**0.5)
    assert stated == pytest.approx(np.std(rates), rel=0.2)


def test_closest_pairs_are_named() -> None:
    generated = draw(40, 100)
    generated[17], generated[60] = TRAINING[2999], TRAINING[3] + 1e-3
    found = look(generated, TRAINING, HELD_OUT, pairs=3)
    assert len(found.closest) == 3
    assert found.closest[0] == (17, 2999, 0.0)
    assert found.closest[1][:2] == (60, 3)
    assert found.closest[1].distance == pytest.approx(1e-3 * 8**0.5)


def test_few_images_leave_the_copying_statistic_open() -> None:
    found = look(draw(50, 15), TRAINING, HELD_OUT[:15])
    assert np.isnan(found.copying_statistic)
    assert 0 <= found.closer_than_held_out <= 1


def test_equal_training_images_do_not_upset_the_cells() -> None:
    found = look(draw(51, 100), np.zeros((50, 8)), HELD_OUT)
    assert found.nearest_is_training < 0.5


def test_one_training_image_is_too_few() -> None:
    with pytest.raises(ValueError, match="2 training images, not 1"):
        memorisation(draw(0, 5), draw(1, 5), [TRAINING[:1]], TRAINING)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_test_is_that_of_scipy(ties: bool) -> None:
    random = np.random.default_rng(0)
    values, others = random.normal(size=80) + 0.3, random.normal(size=120)
    if ties:
        values, others = values.round(), others.round()
    expected = scipy.stats.mannwhitneyu(values, others, method="asymptotic", use_continuity=False)
    found = rank_test(values, others)
    assert found.above == pytest.approx(expected.statistic / (80 * 120))
    assert 2 * scipy.stats.norm.sf(abs(found.z)) == pytest.approx(expected.pvalue, rel=1e-9)

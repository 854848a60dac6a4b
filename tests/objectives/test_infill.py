"""Rearranged text can be put back together, and is distributed as the papers say."""

import numpy as np
import pytest
import torch

from genscale.objectives.infill import SpanLayout, corrupt_spans, rearrange_middle, span_layout
from genscale.runtime.randomness import Rng

VOCABULARY = 100
MIDDLE = {"prefix": 100, "suffix": 101, "middle": 102, "end": 103}


def windows(batch, time):
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(1))


def rng(batch, step=0):
    return Rng(3, step, "train", torch.arange(batch))


def middle_put_back(tokens):
    """Prefix + middle + suffix, from a rearranged row, by hand; and the cuts."""
    row = tokens.tolist()
    suffix, middle, end = (row.index(MIDDLE[name]) for name in ("suffix", "middle", "end"))
    assert row[0] == MIDDLE["prefix"]
    p, s, m = row[1:suffix], row[suffix + 1 : middle], row[middle + 1 : end]
    return p + m + s, (len(p), len(p) + len(m)), row[end + 1 :]


def test_middle_is_text_rearranged():
    tokens = windows(64, 33)
    moved, valid = rearrange_middle(tokens, torch.ones_like(tokens, dtype=torch.bool), MIDDLE, 1.0, rng(64))
    assert moved.shape == tokens.shape
    assert valid.all()
    for row, original in zip(moved, tokens, strict=True):
        text, _, rest = middle_put_back(row)
        assert text == original.tolist()[:29]
        assert rest == []


def test_middle_cuts_are_uniform():
    tokens = windows(1, 14).expand(6000, 14)
    moved, _ = rearrange_middle(tokens, torch.ones_like(tokens, dtype=torch.bool), MIDDLE, 1.0, rng(6000))
    cuts = np.array([middle_put_back(row)[1] for row in moved])
    # Two places, each uniform over 0..10: the smaller is k with probability (2 (10 - k) + 1) / 121.
    for column, chances in ((0, (2 * (10 - np.arange(11)) + 1) / 121), (1, (2 * np.arange(11) + 1) / 121)):
        counts = np.bincount(cuts[:, column], minlength=11)
        chi_square = ((counts - 6000 * chances) ** 2 / (6000 * chances)).sum()
        assert chi_square < 29.6  # 10 degrees of freedom, p = 0.001


def test_middle_rate_is_the_share_of_rearranged_windows():
    tokens = windows(4000, 20)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    moved, _ = rearrange_middle(tokens, valid, MIDDLE, 0.3, rng(4000))
    rearranged = (moved != tokens).any(dim=1)
    assert rearranged.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (moved[rearranged][:, 0] == MIDDLE["prefix"]).all()


def test_middle_keeps_padding_last_and_out_of_the_loss():
    tokens = windows(50, 33)
    valid = torch.arange(33) < torch.randint(0, 34, (50, 1), generator=torch.Generator().manual_seed(2))
    moved, counts = rearrange_middle(tokens, valid, MIDDLE, 1.0, rng(50))
    for row, flags, original, used in zip(moved, counts, tokens, valid.sum(dim=1).tolist(), strict=True):
        if used == 0:
            assert torch.equal(row, original)
            assert not flags.any()
            continue
        text, _, _ = middle_put_back(row)
        assert text == original.tolist()[: min(used, 29)]
        assert flags[: len(text) + 4].all()
        assert not flags[len(text) + 4 :].any()


def test_span_layout_has_the_reference_proportions_and_fills_the_window():
    for window in (9, 65, 257, 513, 1025):
        layout = span_layout(window, 0.15, 3.0)
        assert layout.noise == max(1, round(0.15 * layout.text))
        assert layout.spans == max(1, round(layout.noise / 3.0))
        assert window - 3 < layout.corrupted + layout.targets <= window
    assert span_layout(513, 0.15, 3.0).text > 450


def spans_put_back(row, layout, special):
    """The text, from a corrupted row, by hand: each sentinel replaced by what the targets say."""
    names = {number: name for name, number in special.items()}
    answers, current = {}, None
    for token in row[layout.corrupted :]:
        if token in names:
            current = names[token]
            answers[current] = []
        else:
            answers[current].append(token)
    assert list(answers) == [*(f"span {i}" for i in range(layout.spans)), "end"]
    assert answers.pop("end") == []
    text = []
    for token in row[: layout.corrupted]:
        text += answers[names[token]] if token in names else [token]
    return text, [len(answer) for answer in answers.values()]


def test_spans_are_text_corrupted_and_answered():
    layout = span_layout(65, 0.2, 2.5)
    special = {**{f"span {i}": VOCABULARY + i for i in range(layout.spans)}, "end": VOCABULARY + layout.spans}
    tokens = windows(64, 65)
    moved, valid = corrupt_spans(tokens, torch.ones_like(tokens, dtype=torch.bool), layout, special, rng(64))
    assert moved.shape == (64, layout.corrupted + layout.targets)
    assert valid.all()
    for row, original in zip(moved.tolist(), tokens.tolist(), strict=True):
        text, lengths = spans_put_back(row, layout, special)
        assert text == original[: layout.text]
        assert sum(lengths) == layout.noise
        assert min(lengths) >= 1
        assert row[0] == original[0]  # text first, then spans, in turns, as in T5


def test_span_splits_are_all_equally_likely():
    """4 corrupted tokens in 2 spans, 3 others in 2 stretches: 3 x 2 masks, each with probability 1/6."""
    layout, special = SpanLayout(text=7, noise=4, spans=2), {"span 0": 100, "span 1": 101, "end": 102}
    tokens = torch.arange(7).expand(6000, 7)
    moved, _ = corrupt_spans(tokens, torch.ones_like(tokens, dtype=torch.bool), layout, special, rng(6000))
    masks, counts = np.unique(moved.numpy(), axis=0, return_counts=True)
    assert len(masks) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom, p = 0.001


def test_spans_carry_validity_with_the_tokens():
    layout = span_layout(65, 0.2, 2.5)
    special = {**{f"span {i}": VOCABULARY + i for i in range(layout.spans)}, "end": VOCABULARY + layout.spans}
    tokens = torch.arange(65).expand(8, 65)
    valid = tokens < 40
    valid[0] = False
    moved, counts = corrupt_spans(tokens, valid, layout, special, rng(8))
    text = moved < VOCABULARY
    assert torch.equal(counts[1:][text[1:]], moved[1:][text[1:]] < 40)
    assert counts[1:][~text[1:]].all()
    assert not counts[0].any()

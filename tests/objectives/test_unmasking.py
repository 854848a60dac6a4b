"""Unmasking: what the network sees, in which order masks fall, and that samples have the learned distribution."""

import pytest
import torch
from torch import nn

from genscale.objectives.decoding import TextRequest
from genscale.objectives.unmasking import unmask
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

VOCABULARY, MASK, CONTEXT = 5, 5, 16


class Independent(nn.Module):
    """Each position has a distribution of its own, whatever the other tokens are."""

    def __init__(self):
        super().__init__()
        logits = 1.5 * torch.randn(CONTEXT, VOCABULARY + 1, generator=torch.Generator().manual_seed(0))
        logits[:, MASK] = 50.0  # and would love to write masks
        self.logits = nn.Parameter(logits)
        self.windows = []

    def forward(self, tokens, documents=None, cache=None, positions=None):
        self.windows.append(tokens.clone())
        return self.logits.expand(len(tokens), -1, -1)


def draw(network, request, rows, seed=0):
    return unmask(network, request, Rng(seed, 0, "sample", torch.arange(rows)), CONTEXT, VOCABULARY, MASK)


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_marginals_are_those_of_the_network(steps):
    network, rows = Independent(), 4000
    samples = draw(network, TextRequest([[1, 2]] * rows, tokens=6, steps=steps), rows)
    tokens = torch.tensor([sample.tokens for sample in samples])  # (rows, 6)
    chances = network.logits[2:8, :VOCABULARY].softmax(-1)
    for place in range(6):
        counts = torch.bincount(tokens[:, place], minlength=VOCABULARY)
        expected = rows * chances[place]
        assert ((counts - expected) ** 2 / expected).sum().item() < 18.5  # 4 degrees of freedom, p = 0.001
    joint = torch.bincount(tokens[:, 0] * VOCABULARY + tokens[:, 1], minlength=VOCABULARY**2)
    expected = rows * (chances[0][:, None] * chances[1]).flatten()
    assert ((joint - expected) ** 2 / expected).sum().item() < 51.2  # 24 degrees of freedom


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("steps", [None, 1, 4])
def test_masks_only_ever_become_tokens_equally_many_at_each_step(order, steps):
    network = Independent()
    prompts = [[0], [1, 2, 3], [4] * 5]
    samples = draw(network, TextRequest(prompts, tokens=8, steps=steps, order=order, repetition_penalty=1.2), 3)
    assert len(network.windows) == (steps or 8)
    for step, (before, after) in enumerate(zip(network.windows, network.windows[1:], strict=False)):
        assert torch.equal(before[before != MASK], after[before != MASK])
        assert ((before == MASK).sum(1) - (after == MASK).sum(1)).tolist() == [8 // (steps or 8)] * 3, step
    for window, prompt in zip(network.windows[0].tolist(), prompts, strict=True):
        assert window == prompt + [MASK] * (CONTEXT - len(prompt))
    assert all(len(sample.tokens) == 8 and max(sample.tokens) < VOCABULARY for sample in samples)


def test_confidence_unmasks_the_surest_first():
    network = Independent()
    draw(network, TextRequest([[0]], tokens=8, temperature=0.0, order="confidence"), 1)
    surest = network.logits[1:9, :VOCABULARY].softmax(-1).amax(-1).argsort(descending=True) + 1
    for step, window in enumerate(network.windows[1:]):
        assert set((window[0] != MASK).nonzero().flatten().tolist()) == {0, *surest[: step + 1].tolist()}


def test_random_order_differs_between_rows_and_does_not_depend_on_the_batch():
    network = Independent()
    prompts = [[0], [1, 2], [3]]
    together = draw(network, TextRequest(prompts, tokens=20), 3)
    first_unmasked = {tuple((window != MASK).tolist()) for window in network.windows[2]}
    assert len(first_unmasked) == 3
    for row, prompt in enumerate(prompts):
        rng = Rng(0, 0, "sample", torch.tensor([row]))
        assert unmask(network, TextRequest([prompt], tokens=20), rng, CONTEXT, VOCABULARY, MASK) == [together[row]]


def test_long_texts_go_on_in_blocks_that_see_the_text_before():
    network = Independent()
    (sample,) = draw(network, TextRequest([[0, 1, 2]], tokens=20, steps=10), 1)
    assert len(sample.tokens) == 20
    text = [0, 1, 2, *sample.tokens]
    assert network.windows[0][0].tolist() == text[:3] + [MASK] * 13
    assert network.windows[4][0].tolist() == text[3:11] + [MASK] * 8
    assert network.windows[8][0].tolist() == text[7:19] + [MASK] * 4
    assert len(network.windows) == 4 + 4 + 2


def test_suffixes_are_seen_after_the_block():
    network = Independent()
    draw(network, TextRequest([[0, 1]], tokens=4, suffixes=[[2, 3]]), 1)
    assert network.windows[0][0].tolist() == [0, 1, MASK, MASK, MASK, MASK, 2, 3] + [MASK] * 8
    with pytest.raises(UserError, match="half the context"):
        draw(network, TextRequest([[0, 1]], tokens=9, suffixes=[[2, 3]]), 1)


def test_end_tokens_and_watch_cut_the_text_in_reading_order():
    network = Independent()
    with torch.no_grad():
        network.logits[:] = 0
        for place, token in enumerate([0, 1, 2, 3, 4, 0, 1, 2]):
            network.logits[place + 1, token] = 100.0
    request = TextRequest([[0]], tokens=8, temperature=0.0)
    assert draw(network, request, 1) == [([0, 1, 2, 3, 4, 0, 1, 2], "length")]
    assert draw(network, TextRequest([[0]], 8, temperature=0.0, ends=(3,)), 1) == [([0, 1, 2], "end")]
    heard = []
    watched = TextRequest([[0]], 8, temperature=0.0, watch=lambda row, token: heard.append((row, token)) or token == 1)
    assert draw(network, watched, 1) == [([0, 1], "watch")]
    assert heard == [(0, 0), (0, 1)]

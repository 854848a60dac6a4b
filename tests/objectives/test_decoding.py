"""Choosing tokens against transformers' processors; the loop over tokens against one without a cache."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from genscale.models.transformer import Transformer
from genscale.objectives.decoding import (
    Filling,
    TextRequest,
    choose,
    decode,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    seen_tokens,
)
from genscale.recipe.model import TransformerModel
from genscale.runtime.randomness import Rng

VOCABULARY, CONTEXT = 50, 16


def random_logits(rows=8, vocabulary=VOCABULARY):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
        (lambda x: keep_top_k(x, 1000), TopKLogitsWarper(1000)),
        (lambda x: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_min_p(x, 0.05), MinPLogitsWarper(0.05)),
        (lambda x: keep_min_p(x, 1.0), MinPLogitsWarper(1.0)),
    ],
)
def test_filters_equal_transformers(ours, theirs):
    logits = random_logits()
    expected = theirs(torch.zeros(8, 1, dtype=torch.long), logits.clone())
    torch.testing.assert_close(ours(logits), expected, rtol=0, atol=0)


def test_repetition_penalty_equals_transformers():
    logits = random_logits()
    history = torch.randint(VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    seen = seen_tokens(history.tolist(), VOCABULARY, torch.device("cpu"))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.7), expected, rtol=0, atol=0)


def test_choices_have_the_distribution_of_transformers_processors_together():
    """Over an even grid of draws, each token's share is its probability to within the grid's spacing."""
    logits, history = random_logits(rows=1), torch.tensor([[3, 4, 5]])
    request = TextRequest([], 1, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    expected = processors(history, logits.clone()).softmax(-1)[0]
    seen = seen_tokens(history.tolist(), VOCABULARY, torch.device("cpu"))
    grid = (torch.arange(20_000) + 0.5) / 20_000
    chosen = choose(logits.expand(20_000, -1), request, seen.expand(20_000, -1), grid)
    shares = torch.bincount(chosen, minlength=VOCABULARY) / 20_000
    assert (shares - expected).abs().max() < 2e-4
    assert (shares[expected == 0] == 0).all()


def test_the_edges_of_the_draw_never_choose_what_is_forbidden():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]])
    draws = torch.tensor([0.0, 1 - 2.0**-24])
    assert choose(logits.expand(2, -1), TextRequest([], 1), None, draws).tolist() == [1, 3]


def test_temperature_zero_takes_the_likeliest():
    logits = random_logits()
    assert torch.equal(choose(logits, TextRequest([], 1, temperature=0.0), None, torch.rand(8)), logits.argmax(-1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Transformer(TransformerModel(layers=2, width=32, heads=2, context=CONTEXT), VOCABULARY + 3)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that every token depends on those before it
    return made.eval()


def without_cache(network, prompt, request, row):
    """The same text by the plainest loop: a whole forward for each token."""
    text, first_seen = list(prompt[-CONTEXT:]), 0
    start = len(text)
    for number in range(request.tokens):
        if len(text) - first_seen > CONTEXT:
            first_seen = len(text) - CONTEXT // 2
        with torch.no_grad():
            logits = network(torch.tensor([text[first_seen:]]))[:, -1, :VOCABULARY]
        seen = seen_tokens([text], VOCABULARY, torch.device("cpu"))
        draw = Rng(7, 0, "sample", torch.tensor([row])).uniform(f"token {number}")
        text.append(choose(logits, request, seen, draw).item())
    return text[start:]


PROMPTS = [[1], [2, 3, 4, 5, 6, 7], [8, 9], list(range(10, 40)), list(range(16))]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.9, "top_k": 10, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
def test_cached_batches_write_what_the_plainest_loop_writes_past_the_context(network, how):
    request = TextRequest(PROMPTS, tokens=3 * CONTEXT, **how)
    samples = decode(network, request, Rng(7, 0, "sample", torch.arange(5)), CONTEXT, VOCABULARY)
    for row, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        assert sample.tokens == without_cache(network, prompt, request, row)
        assert sample.stopped == "length"


def test_a_row_does_not_depend_on_its_batch(network):
    def texts(prompts, rows, seed=7):
        rng = Rng(seed, 0, "sample", torch.tensor(rows))
        return decode(network, TextRequest(prompts, 40), rng, CONTEXT, VOCABULARY)

    together = texts(PROMPTS, range(5))
    for row, prompt in enumerate(PROMPTS):
        assert texts([prompt], [row]) == [together[row]]
    other_seed = texts(PROMPTS, range(5), seed=8)
    assert all(one.tokens != other.tokens for one, other in zip(together, other_seed, strict=True))
    assert len({tuple(sample.tokens) for sample in texts([[1]] * 4, range(4))}) == 4


class Scripted(torch.nn.Module):
    """Wants to write what follows the last token in a script, special ids included."""

    def __init__(self, follows, ids):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(ids, ids))
        with torch.no_grad():
            for token, after in follows.items():
                for rank, wanted in enumerate(after):
                    self.table[token, wanted] = 100.0 - 10 * rank
        self.windows = []

    def forward(self, tokens, documents=None, cache=None, positions=None):
        self.windows.append(tokens.tolist())
        cache.advance(tokens.shape[1])
        return self.table[tokens]


def script(follows, request, ids=10, vocabulary=8, context=64, filling=None):
    network = Scripted(follows, ids)
    rng = Rng(0, 0, "sample", torch.arange(len(request.prompts)))
    return decode(network, request, rng, context, vocabulary, filling), network


def test_end_tokens_stop_a_row_and_are_not_in_its_text():
    request = TextRequest([[0], [3]], tokens=5, temperature=0.0, ends=(7,))
    samples, _ = script({0: [1], 1: [2], 2: [7], 3: [4], 4: [3], 7: [0]}, request)
    assert samples == [([1, 2], "end"), ([4, 3, 4, 3, 4], "length")]


def test_special_ids_are_never_written():
    samples, _ = script({0: [9, 8, 1], 1: [8, 0]}, TextRequest([[0]], tokens=4, temperature=0.0))
    assert samples[0].tokens == [1, 0, 1, 0]


def test_watch_sees_each_token_in_order_and_stops_its_row():
    heard = []

    def watch(row, token):
        heard.append((row, token))
        return token == 2

    request = TextRequest([[0], [3]], tokens=4, temperature=0.0, watch=watch)
    samples, _ = script({0: [1], 1: [2], 2: [0], 3: [4], 4: [3]}, request)
    assert samples == [([1, 2], "watch"), ([4, 3, 4, 3], "length")]
    assert heard == [(0, 1), (1, 4), (0, 2), (1, 3), (1, 4), (1, 3)]


def test_fillings_stand_between_their_sentinels_and_end_at_one():
    filling = Filling((8,), (9,), (10,), (11,))
    request = TextRequest([[1, 2], [3]], tokens=5, suffixes=[[4], [5, 6]], temperature=0.0)
    samples, network = script({10: [9, 1], 1: [11]}, request, ids=12, filling=filling)
    assert network.windows[0] == [[8, 1, 2, 9, 4, 10], [8, 3, 9, 5, 6, 10]]
    assert samples == [([1], "end"), ([1], "end")]


def test_long_prompts_and_suffixes_are_cut_on_their_outer_sides_and_leave_room_to_fill():
    filling = Filling((8,), (9,), (10,), (11,))
    prompt, suffix = [0, 1, 2, 3] * 5, [4, 5, 6, 7] * 5
    request = TextRequest([prompt], tokens=100, suffixes=[suffix], temperature=0.0)
    samples, network = script({10: [1], 1: [1]}, request, ids=12, context=16, filling=filling)
    (window,) = network.windows[0]
    assert window == [8, *prompt[-3:], 9, *suffix[:3], 10]
    assert samples == [([1] * 8, "length")]  # and the context is full
    assert sum(len(window[0]) for window in network.windows) <= 16


def test_sampling_leaves_the_network_as_it_was(network):
    network.train()
    decode(network, TextRequest([[1]], 2), Rng(0, 0, "sample", torch.arange(1)), CONTEXT, VOCABULARY)
    assert network.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in network.parameters())
    network.eval()


def test_a_compiled_network_is_not_compiled_anew_for_every_length(network):
    compiled = []
    network.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward, dynamic=False)
    try:
        decode(network, TextRequest(PROMPTS, 40), Rng(0, 0, "sample", torch.arange(5)), CONTEXT, VOCABULARY)
        assert compiled == []
        network(torch.zeros(1, 4, dtype=torch.long))
        assert len(compiled) > 0
    finally:
        network._compiled_call_impl = None


def test_an_empty_prompt_is_refused(network):
    with pytest.raises(ValueError, match="at least one token"):
        decode(network, TextRequest([[]], 2), Rng(0, 0, "sample", torch.arange(1)), CONTEXT, VOCABULARY)

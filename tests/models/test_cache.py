"""Logits with a key-value cache equal those of one forward over everything."""

import pytest
import torch

from genscale.models.cache import KeyValueCache
from genscale.models.initialise import initialise
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel

SHAPES = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "grouped": {"key_value_heads": 2},
    "window": {"sliding_window": 4},
    "gemma": {"sliding_window": 4, "sliding_window_layers": "even", "attention_soft_cap": 3.0, "post_norm": True},
}


def network(**options):
    shape = TransformerModel(layers=2, width=32, heads=4, context=40, initial_std=0.2, **options)
    model = Transformer(shape, 31)
    initialise(model, seed=1)
    return model.eval()


def tokens(batch, length):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=["at once", "one by one", "in pieces"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_a_full_forward(shape, pieces):
    model, text, cache = network(**SHAPES[shape]), tokens(3, 20), KeyValueCache()
    found = torch.cat([model(piece, cache=cache) for piece in text.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(found, model(text), atol=1e-5, rtol=1e-5)
    assert cache.length == cache.lengths == 20


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_left_padding_changes_no_row(shape):
    model, lengths = network(**SHAPES[shape]), torch.tensor([9, 3, 12])
    texts = [row[:n] for row, n in zip(tokens(3, 12), lengths.tolist(), strict=True)]
    more = tokens(3, 18)[:, 12:]
    padded = torch.stack([torch.nn.functional.pad(text, (12 - len(text), 0)) for text in texts])
    cache = KeyValueCache(capacity=18, start=12 - lengths)
    found = [model(padded, cache=cache)] + [model(more[:, i : i + 1], cache=cache) for i in range(6)]
    logits = torch.cat(found, dim=1)
    assert logits.isfinite().all()
    for row, text in enumerate(texts):
        alone = model(torch.cat((text, more[row]))[None])[0]
        torch.testing.assert_close(logits[row, 12 - len(text) :], alone, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == (lengths + 6).tolist()


@torch.no_grad()
def test_rows_that_have_ended_can_leave_and_guesses_be_taken_back():
    model, text, cache = network(), tokens(3, 20), KeyValueCache(start=torch.tensor([0, 0, 0]))
    model(text[:, :10], cache=cache)
    model(tokens(3, 4), cache=cache)
    cache.truncate(10)
    cache.keep(torch.tensor([2, 0]))
    found = model(text[[2, 0], 10:], cache=cache)
    torch.testing.assert_close(found, model(text[[2, 0]])[:, 10:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_given_capacity_takes_memory_once_and_is_kept_to():
    model, cache = network(), KeyValueCache(capacity=8)
    model(tokens(1, 2), cache=cache)
    first = cache._layers[0]
    model(tokens(1, 6), cache=cache)
    assert cache._layers[0] is first
    with pytest.raises(ValueError, match="room for 8 tokens, not 9"):
        model(tokens(1, 1), cache=cache)


def test_a_cache_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="causal attention over whole rows"):
        network()(tokens(1, 4), documents=torch.zeros(1, 4, dtype=torch.long), cache=KeyValueCache())
    both_ways = Transformer(TransformerModel(layers=1, width=8, heads=1), 31, causal=False)
    with pytest.raises(ValueError, match="causal attention over whole rows"):
        both_ways(tokens(1, 4), cache=KeyValueCache())

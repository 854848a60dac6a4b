"""Dropped tokens: how many, by what, and only in the inputs of training."""

import torch
from scipy import stats

from genscale.data.batch import TextBatch
from genscale.data.description import TextDescription
from genscale.objectives.build import build_objective
from genscale.objectives.token_dropout import drop_tokens
from genscale.recipe.model import TransformerModel
from genscale.recipe.objective import CausalObjective
from genscale.recipe.schema import Recipe
from genscale.runtime.randomness import Rng

VOCABULARY = 20


def rng(batch, step=0, first=0):
    return Rng(5, step, "train", torch.arange(first, first + batch))


def test_the_rate_is_kept_and_replacements_are_even():
    tokens = torch.full((300, 100), 7)
    dropped = drop_tokens(tokens, 0.3, VOCABULARY, rng(300))
    low, high = stats.binom.interval(1 - 1e-4, 30_000, 0.3 * (1 - 1 / VOCABULARY))  # a few become what they were
    assert low <= int((dropped != tokens).sum()) <= high
    counts = dropped[dropped != tokens].bincount(minlength=VOCABULARY)
    assert counts[7] == 0
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    assert len(counts) == VOCABULARY
    assert torch.equal(drop_tokens(tokens, 0.0, VOCABULARY, rng(300)), tokens)


def test_drops_do_not_depend_on_the_micro_batch_but_on_the_step():
    tokens = torch.arange(800).view(8, 100) % VOCABULARY
    whole = drop_tokens(tokens, 0.5, VOCABULARY, rng(8))
    halves = [drop_tokens(tokens[i : i + 4], 0.5, VOCABULARY, rng(4, first=i)) for i in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, drop_tokens(tokens, 0.5, VOCABULARY, rng(8, step=1)))


def test_only_the_inputs_of_training_are_dropped():
    shape = TransformerModel(layers=1, width=16, heads=1, context=50)
    recipe = Recipe(model=shape, objective=CausalObjective(token_dropout=0.4))
    objective = build_objective(recipe, TextDescription(VOCABULARY))
    tokens = torch.arange(4 * 51).view(4, 51) % VOCABULARY
    batch = TextBatch(tokens, torch.zeros_like(tokens, dtype=torch.int32), None, torch.arange(4))
    inputs, targets = objective.prepare(batch, rng(4))
    assert torch.equal(inputs["tokens"], drop_tokens(tokens[:, :-1], 0.4, VOCABULARY, rng(4)))
    assert not torch.equal(inputs["tokens"], tokens[:, :-1])
    assert torch.equal(targets.tokens, tokens[:, 1:])
    inputs, _ = objective.eval().prepare(batch, rng(4))
    assert torch.equal(inputs["tokens"], tokens[:, :-1])

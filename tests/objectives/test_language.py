"""The objectives of text: what they compare, how their losses are normalised, and that training teaches them."""

import pytest
import torch
from torch import nn

from genscale.data.batch import TextBatch
from genscale.data.description import TextDescription
from genscale.models.embedding import Head
from genscale.objectives.build import build_objective
from genscale.objectives.decoding import TextRequest
from genscale.recipe.model import TransformerModel
from genscale.recipe.objective import CausalObjective, InfillObjective, MaskedObjective
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError
from genscale.runtime.randomness import Rng

VOCABULARY = 12
OBJECTIVES = {
    "causal": CausalObjective(label_smoothing=0.1, z_loss=1e-3),
    "masked": MaskedObjective(label_smoothing=0.1, z_loss=1e-3),
    "middle": InfillObjective(form="middle", label_smoothing=0.1, z_loss=1e-3),
    "spans": InfillObjective(form="spans", label_smoothing=0.1, z_loss=1e-3),
}


def build(kind, context=24, **model):
    options = OBJECTIVES[kind] if isinstance(kind, str) else kind
    shape = TransformerModel(**{"layers": 2, "width": 32, "heads": 2, "context": context, **model})
    return build_objective(Recipe(model=shape, objective=options), TextDescription(VOCABULARY))


def random_batch(size, context=24, ragged=False, positions=None):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCABULARY, (size, context + 1), generator=generator)
    documents = (torch.rand(size, context + 1, generator=generator) < 0.1).int().cumsum(1).int()
    chances = torch.rand(size, 1, generator=generator)
    valid = torch.rand(size, context, generator=generator) < chances if ragged else None
    return TextBatch(tokens, documents, valid, torch.arange(size) if positions is None else positions)


def part(batch, start, stop):
    valid = None if batch.valid is None else batch.valid[start:stop]
    return TextBatch(batch.tokens[start:stop], batch.documents[start:stop], valid, batch.positions[start:stop])


def gradient(objective, batches, step=3):
    """As the training loop does it: totals, divided once by the global weight."""
    objective.zero_grad()
    phase = objective.phases[0]
    weight = sum(objective.weight(phase, batch) for batch in batches)
    for batch in batches:
        (objective.loss(phase, batch, Rng(0, step, phase.name, batch.positions), {}).total / weight).backward()
    return torch.cat([parameter.grad.flatten() for parameter in objective.parameters()])


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("ragged", [False, True])
def test_accumulation_does_not_change_the_gradient(kind, ragged):
    objective = build(kind, within_documents=kind in ("causal", "masked")).double()
    batch = random_batch(8, ragged=ragged)
    whole = gradient(objective, [batch])
    assert whole.norm() > 1e-3
    for pieces in (2, 4, 8):
        size = 8 // pieces
        accumulated = gradient(objective, [part(batch, i, i + size) for i in range(0, 8, size)])
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    uneven = gradient(objective, [part(batch, 0, 1), part(batch, 1, 6), part(batch, 6, 8)])
    torch.testing.assert_close(uneven, whole, rtol=0, atol=1e-6 * whole.abs().max().item())


class Constant(nn.Module):
    """A network with the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens, documents=None, cache=None, positions=None, logits=True):
        self.seen = tokens
        return self.logits.expand(*tokens.shape, -1) if logits else torch.ones(*tokens.shape, 1)

    def head(self, hidden, read):
        return read(hidden, self.logits[:, None], Head(1, len(self.logits)))


def test_causal_compares_each_token_with_the_one_before_and_leaves_out_what_is_not_valid():
    objective = build("causal")
    batch = random_batch(6, ragged=True)
    inputs, _ = objective.prepare(batch, Rng(0, 0, "train", batch.positions))
    logits = objective.networks["model"].eval()(**inputs)
    log_probability = logits.log_softmax(-1)
    expected = sum(
        -log_probability[i, t, batch.tokens[i, t + 1]].item() for i in range(6) for t in range(24) if batch.valid[i, t]
    )
    total, metrics = objective.validate(batch, Rng(0, 0, "validate", batch.positions))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"][0].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"][1] == objective.weight(objective.phases[0], batch) == batch.valid.sum()
    assert list(inputs) == ["tokens"]
    inputs, _ = build("causal", within_documents=True).prepare(batch, Rng(0, 0, "train", batch.positions))
    assert torch.equal(inputs["documents"], batch.documents[:, :-1])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_smoothing_and_penalties_are_for_training_only(kind):
    objective = build(kind).eval()
    batch = random_batch(4)
    rng = Rng(0, 0, "train", batch.positions)
    training, validation = objective.loss(objective.phases[0], batch, rng, {}), objective.validate(batch, rng)
    assert training.total.item() != pytest.approx(validation.total.item(), rel=1e-3)
    assert training.metrics["loss"][0].item() == pytest.approx(validation.total.item(), rel=1e-6)
    assert "z_loss" in training.metrics
    assert list(validation.metrics) == ["loss"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_weight_is_the_number_of_scored_tokens_of_full_windows(kind):
    objective = build(kind)
    batch = random_batch(5)
    scored = objective.validate(batch, Rng(0, 0, "validate", batch.positions)).metrics["loss"][1]
    assert objective.weight(objective.phases[0], batch) == scored


def test_masked_loss_is_the_cross_entropy_of_a_network_that_ignores_its_input():
    """For such a network the bound is tight: nats per token are those of its distribution, at any masking rate."""
    objective = build("masked", context=64)
    logits = torch.randn(VOCABULARY + 1, generator=torch.Generator().manual_seed(0))
    objective.networks["model"] = Constant(logits)
    batch = random_batch(2048, context=64)
    ((total, count),) = objective.validate(batch, Rng(0, 0, "validate", batch.positions)).metrics.values()
    exact = -logits[:VOCABULARY].log_softmax(0)[batch.tokens[:, 1:]].mean().item()  # the mask itself has no chance
    assert (total / count).item() == pytest.approx(exact, rel=0.02)


def test_masking_rates_are_spread_evenly_and_kept_by_position():
    objective = build("masked", context=256)
    tokens = torch.zeros(64, 257, dtype=torch.long)
    batch = TextBatch(tokens, tokens.int(), None, torch.arange(64))
    shares = []
    for step in (0, 1):
        inputs, _ = objective.prepare(batch, Rng(0, step, "train", batch.positions))
        shares.append((inputs["tokens"] == objective.special["mask"]).float().mean(dim=1))
        again, _ = objective.prepare(part(batch, 40, 64), Rng(0, step, "train", batch.positions[40:]))
        assert torch.equal(again["tokens"], inputs["tokens"][40:])
        ordered = shares[-1].sort().values
        assert (ordered - (torch.arange(64) + 0.5) / 64).abs().max() < 0.12
    assert not torch.equal(*shares)


@pytest.mark.parametrize("kind", ["causal", "masked", "middle"])
def test_what_padding_holds_does_not_matter(kind):
    objective = build(kind).eval()
    batch = random_batch(8)
    valid = torch.arange(24) < torch.tensor([24, 20, 17, 12, 8, 3, 1, 0])[:, None]
    losses = []
    for padding in (0, 7):
        text = torch.cat((torch.ones(8, 1, dtype=torch.bool), valid), dim=1)
        tokens = torch.where(text, batch.tokens, padding)
        padded = TextBatch(tokens, batch.documents, valid, batch.positions)
        losses.append(objective.validate(padded, Rng(0, 0, "validate", batch.positions)))
    torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-6, atol=0)
    if kind != "middle":  # where sentinels count as well
        assert losses[0].metrics["loss"][1] == valid.sum()


def test_masked_network_never_reads_padding():
    objective = build("masked")
    batch = random_batch(8, ragged=True)
    objective.networks["model"] = network = Constant(torch.zeros(VOCABULARY + 1))
    objective.validate(batch, Rng(0, 0, "validate", batch.positions))
    assert (network.seen[~batch.valid] == objective.special["mask"]).all()


def test_infill_spans_scores_only_the_answers():
    objective = build("spans", context=64)
    batch = random_batch(3, context=64)
    inputs, targets = objective.prepare(batch, Rng(0, 0, "train", batch.positions))
    length = objective.spans.corrupted + objective.spans.targets
    assert inputs["tokens"].shape == (3, length - 1)
    assert targets.tokens.shape == (3, objective.spans.targets)
    assert (targets.tokens[:, 0] == objective.special["span 0"]).all()
    assert (targets.tokens[:, -1] == objective.special["end"]).all()
    total, _ = objective.validate(batch, Rng(0, 0, "train", batch.positions))
    logits = objective.networks["model"].eval()(**inputs).log_softmax(-1)[:, objective.spans.corrupted - 1 :]
    assert total.item() == pytest.approx(-logits.gather(2, targets.tokens[..., None]).sum().item(), rel=1e-5)


def test_special_ids_are_above_the_vocabulary_and_the_network_has_room_for_them():
    for kind, names in (("causal", 0), ("masked", 1), ("middle", 4), ("spans", None)):
        objective = build(kind)
        assert objective.vocabulary == VOCABULARY
        names = len(objective.special) if names is None else names
        assert sorted(objective.special.values()) == list(range(VOCABULARY, VOCABULARY + names))
        logits = objective.networks["model"](torch.zeros(1, 3, dtype=torch.long))
        assert logits.shape[-1] == VOCABULARY + names
        assert objective.flops_per_sample() > 0


def test_same_seed_same_weights():
    first, second = build("causal"), build("causal")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "model", "words"),
    [
        ("middle", {"within_documents": True}, "model.within_documents"),
        ("spans", {"context": 8}, "model.context"),
    ],
)
def test_impossible_models_are_user_errors(kind, model, words):
    with pytest.raises(UserError, match=words):
        build(kind, **model)


def test_suffix_for_a_causal_network_is_a_user_error():
    with pytest.raises(UserError, match=r"objective\.kind: infill"):
        build("causal").sample(TextRequest([[1]], 4, suffixes=[[2]]), Rng(0, 0, "sample", torch.arange(1)))


COUNTING, CONSTANT = 1, 0


def tiny_language(step, size, context, language):
    """Windows of 0 1 2 3 4 5 0 1 2 ... from a random place on, or of one random token alone."""
    starts = Rng(1, step, "data", torch.arange(size)).integers("start", 6)
    tokens = (starts[:, None] + language * torch.arange(context + 1)) % 6
    return TextBatch(tokens, torch.zeros_like(tokens, dtype=torch.int32), None, torch.arange(size))


def trained(options, language, context=24):
    objective = build(options, context=context, width=64, heads=4, layers=2, query_key_norm=True, feed_forward="gelu")
    optimizer = torch.optim.Adam(objective.parameters(), 5e-3)
    phase = objective.phases[0]
    for step in range(60):
        batch = tiny_language(step, 32, context, language)
        loss = objective.loss(phase, batch, Rng(0, step, "train", batch.positions), {})
        (loss.total / objective.weight(phase, batch)).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return objective


PREFIXES = [[(i - length) % 6 for i in range(length)] for length in range(8, 14)]  # each ends in 5


def continuations(objective):
    request = TextRequest(PREFIXES, tokens=8, temperature=0.0)
    return [sample.tokens for sample in objective.sample(request, Rng(0, 0, "sample", torch.arange(6)))]


def test_causal_learns_a_tiny_language_and_goes_on_in_it():
    objective = trained(CausalObjective(), COUNTING)
    assert continuations(objective) == [[0, 1, 2, 3, 4, 5, 0, 1]] * 6


def test_masked_learns_a_tiny_language_goes_on_and_fills_in():
    objective = trained(MaskedObjective(), COUNTING)
    assert continuations(objective) == [[0, 1, 2, 3, 4, 5, 0, 1]] * 6
    suffixes = [[(3 + i) % 6 for i in range(8)]] * 6
    request = TextRequest([prefix[:-1] for prefix in PREFIXES], tokens=4, suffixes=suffixes, temperature=0.0)
    samples = objective.sample(request, Rng(0, 0, "sample", torch.arange(6)))
    assert [sample.tokens for sample in samples] == [[5, 0, 1, 2]] * 6


@pytest.mark.parametrize("rate", [0.7, 1.0])
def test_middle_learns_a_tiny_language_and_goes_on_even_if_it_never_saw_plain_text(rate):
    objective = trained(InfillObjective(rate=rate), COUNTING)
    assert continuations(objective) == [[0, 1, 2, 3, 4, 5, 0, 1]] * 6


@pytest.mark.parametrize("options", [InfillObjective(rate=0.7), InfillObjective(form="spans", noise_density=0.3)])
def test_infill_learns_a_tiny_language_and_fills_in(options):
    objective = trained(options, CONSTANT)
    request = TextRequest(
        [[token] * (5 + token) for token in range(6)],
        tokens=12,
        suffixes=[[token] * (9 - token) for token in range(6)],
        temperature=0.0,
    )
    samples = objective.sample(request, Rng(0, 0, "sample", torch.arange(6)))
    for token, sample in enumerate(samples):
        assert set(sample.tokens) == {token}
        assert options.form == "middle" or sample.stopped == "end"


class Recording(Constant):
    def forward(self, tokens, documents=None, cache=None, positions=None):
        cache.advance(tokens.shape[1])
        self.first = getattr(self, "first", tokens.tolist())
        return super().forward(tokens)


@pytest.mark.parametrize(
    ("options", "suffixes", "expected"),
    [
        (InfillObjective(rate=0.5), None, [[1, 2]]),
        (InfillObjective(rate=1.0), None, [["prefix", 1, 2]]),
        (InfillObjective(), [[3, 4]], [["prefix", 1, 2, "suffix", 3, 4, "middle"]]),
        (InfillObjective(form="spans"), None, [[1, 2, "span 0", "span 0"]]),
        (InfillObjective(form="spans", mean_span=1.0), [[3, 4]], [[1, 2, "span 0", 3, 4, "span 1", "span 0"]]),
        (InfillObjective(form="spans", mean_span=9.0), [[3, 4]], [[1, 2, "span 0", 3, 4, "span 0"]]),
    ],
)
def test_infill_is_asked_in_the_form_that_it_was_trained_in(options, suffixes, expected):
    objective = build(options)
    objective.networks["model"] = network = Recording(torch.zeros(VOCABULARY + len(objective.special)))
    objective.sample(TextRequest([[1, 2]], 3, suffixes=suffixes), Rng(0, 0, "sample", torch.arange(1)))
    assert network.first == [[objective.special.get(token, token) for token in row] for row in expected]

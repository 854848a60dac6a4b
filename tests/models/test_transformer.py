"""The whole network: documents, windows, cost, dropout, recomputation."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genscale.models.blocks import set_recompute
from genscale.models.initialise import initialise
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel


def network(causal=True, vocabulary=31, **options):
    shape = {"layers": 2, "width": 32, "heads": 4, "context": 24, "initial_std": 0.2} | options
    model = Transformer(TransformerModel(**shape), vocabulary, causal=causal)
    initialise(model, seed=3)
    return model


def tokens(batch=2, length=20, vocabulary=31):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", ["rotary", "learned", "none"])
def test_a_packed_window_gives_each_document_the_logits_it_has_alone(positions):
    model, text = network(positions=positions), tokens(batch=1)
    lengths = [3, 9, 8]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    from_zero = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(text, documents=documents, positions=from_zero)
    alone = torch.cat([model(document) for document in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(packed, model(text, positions=from_zero), atol=1e-2)


def test_causal_logits_do_not_depend_on_later_tokens_and_bidirectional_ones_do():
    text = tokens()
    changed = text.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 31
    causal, both_ways = network(), network(causal=False)
    torch.testing.assert_close(causal(text)[:, :12], causal(changed)[:, :12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both_ways(text)[:, :12], both_ways(changed)[:, :12], atol=1e-2)


@pytest.mark.parametrize(("which", "reach"), [("all", 8), ("even", None), ("odd", None)])
def test_sliding_windows_limit_how_far_information_flows(which, reach):
    # Two layers with a window of 5: a token reaches 2 x 4 back; with one full layer, all the way.
    model, text = network(sliding_window=5, sliding_window_layers=which), tokens()
    changed = text.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    moved = (model(text) - model(changed)).abs().amax((0, 2)) > 1e-5
    expected = torch.arange(20) >= 3
    if reach is not None:
        expected &= torch.arange(20) <= 3 + reach
    assert torch.equal(moved, expected)
    assert [model.window_of(layer) for layer in range(2)] == {"all": [5, 5], "even": [5, None], "odd": [None, 5]}[which]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feed_forward": "gelu", "bias": True, "norm": "layer", "positions": "learned", "tied_head": False},
        {"key_value_heads": 2, "head_width": 16, "hidden": 50},
    ],
)
def test_flops_per_token_are_those_that_torch_counts(options):
    model, text = network(**options), tokens()
    # The math kernel multiplies the whole square of scores, as the convention counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(text).sum().backward()
    assert counter.get_total_flops() == pytest.approx(model.flops_per_token(20) * text.numel(), rel=1e-6)


def test_flops_count_only_keys_inside_the_window():
    full, windowed = network(), network(sliding_window=5, sliding_window_layers="even")
    assert full.flops_per_token(20) - windowed.flops_per_token(20) == 12 * 32 * (20 - 5)


def test_dropout_follows_torch_manual_seed_and_is_off_in_evaluation():
    model, text = network(dropout=0.2), tokens()

    def run(seed):
        torch.manual_seed(seed)
        return model(text)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))
    torch.testing.assert_close(model(text), network()(text))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"attention_soft_cap": 5.0, "sliding_window": 6}])
def test_recomputation_changes_no_gradient(options):
    gradients = []
    for recompute in ("none", "selective", "full"):
        model = network(**options)
        set_recompute(model, recompute)
        torch.manual_seed(0)
        model(tokens()).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(kept, each) for each in recomputed)


def test_recomputation_keeps_fewer_activations():
    def kept(recompute):
        model, sizes = network(), []
        set_recompute(model, recompute)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(tokens())
        return sum(sizes)

    assert kept("full") < kept("none") / 2


def test_embedding_scale_and_logit_soft_cap():
    plain, changed, text = network(), network(embedding_scale=3.0, logit_soft_cap=2.0), tokens()
    torch.testing.assert_close(changed.embedding(text), 3 * plain.embedding(text))
    hidden = 5 * torch.randn(4, 32)
    torch.testing.assert_close(changed.head(hidden), 2 * torch.tanh(plain.head(hidden) / 2))


def test_a_tied_head_is_the_embedding_and_has_one_name():
    tied, untied = network(), network(tied_head=False)
    assert "head.weight" not in tied.state_dict()
    assert "head.weight" in untied.state_dict()
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(tied.head(hidden), hidden @ tied.embedding.weight.T)
    tied.embedding.weight.data.zero_()
    assert not tied.head(hidden).any()


def test_hidden_then_head_is_forward():
    model, text = network(), tokens()
    assert torch.equal(model.head(model.hidden(text)), model(text))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_residual_stream_stays_in_autocasts_dtype(norm):
    model, seen = network(norm=norm), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    assert seen == [torch.bfloat16] * 2
    full = model(tokens())
    assert (logits.float() - full).norm() < 0.03 * full.norm()


def test_parameter_names_are_a_promise():
    model = network(
        layers=1, query_key_norm=True, post_norm=True, bias=True, norm="layer", positions="learned", tied_head=False
    )
    assert sorted({name.rsplit(".", 1)[0] for name in model.state_dict()}) == [
        "blocks.0.attention.key",
        "blocks.0.attention.key_norm",
        "blocks.0.attention.output",
        "blocks.0.attention.query",
        "blocks.0.attention.query_norm",
        "blocks.0.attention.value",
        "blocks.0.attention_norm",
        "blocks.0.attention_post_norm",
        "blocks.0.feed_forward.down",
        "blocks.0.feed_forward.gate",
        "blocks.0.feed_forward.up",
        "blocks.0.feed_forward_norm",
        "blocks.0.feed_forward_post_norm",
        "embedding",
        "head",
        "norm",
        "position_embedding",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"feed_forward": "relu_squared", "sliding_window": 5, "sliding_window_layers": "even"}]
)
def test_the_compiler_sees_one_graph_and_changes_nothing(options):
    model, text = network(**options), tokens()
    documents = (torch.arange(20) // 6).expand(2, 20)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for arguments in ({}, {"documents": documents}):
        with torch.autocast("cpu", torch.bfloat16):  # in which blockwise attention is part of the graph
            found, expected = compiled(text, **arguments), model(text, **arguments)
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
        gradients = [
            torch.autograd.grad(x.float().logsumexp(-1).sum(), model.embedding.weight)[0] for x in (found, expected)
        ]
        assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()

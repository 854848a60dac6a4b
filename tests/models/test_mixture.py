"""The mixture of experts against a loop over tokens, and what it promises to the training loop."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint

from genscale.models.feed_forward import FeedForward
from genscale.models.mixture import (
    MixtureFeedForward,
    _grouped_kernel,
    balance_step,
    begin_step,
    busiest_expert,
    grouped_product,
    loads,
    mixture_layers,
)
from genscale.recipe.mixture import Mixture

KINDS = ("swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared")
WIDTH, HIDDEN, EXPERTS = 6, 10, 5


def layer_of(kind: str = "swiglu", **options) -> MixtureFeedForward:
    torch.manual_seed(0)
    return MixtureFeedForward(WIDTH, HIDDEN, Mixture(experts=EXPERTS, **options), kind).double()


def tokens(batch: int = 6, time: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routed(layer: MixtureFeedForward, token: torch.Tensor) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    """One token's experts, their weights, and its affinities to all experts, which sum to 1."""
    options = layer.options
    logits = layer.router.weight @ token
    scores = logits.exp() / logits.exp().sum() if options.score == "softmax" else 1 / (1 + torch.exp(-logits))
    ranking = scores if layer.choice_bias is None else scores + layer.choice_bias
    chosen = sorted(range(EXPERTS), key=lambda expert: -ranking[expert].item())[: options.active]
    total = sum(scores[expert] for expert in chosen) if options.active > 1 else 1.0
    return chosen, [scores[expert] / total for expert in chosen], scores / scores.sum()


def reference(layer: MixtureFeedForward, x: torch.Tensor) -> torch.Tensor:
    """Token by token, each expert as a FeedForward of its own."""
    rows = []
    for token in x.flatten(0, 1):
        y = torch.zeros_like(token) if layer.shared is None else layer.shared(token)
        chosen, weights, _ = routed(layer, token)
        for expert, weight in zip(chosen, weights, strict=True):
            dense = FeedForward(WIDTH, HIDDEN, layer.experts.kind).double()
            stacks = {f"{name}.weight": stack[expert] for name, stack in layer.experts.named_parameters()}
            y = y + weight * torch.func.functional_call(dense, stacks, (token,))
        rows.append(y)
    return torch.stack(rows).view_as(x)


def auxiliary(layer: MixtureFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The auxiliary losses summed over sequences, from their definitions."""
    options, total = layer.options, torch.zeros((), dtype=torch.float64)
    for sequence in x:
        frequency, share = [0.0] * EXPERTS, torch.zeros(EXPERTS, dtype=torch.float64)
        for token in sequence:
            chosen, _, affinities = routed(layer, token)
            for expert in chosen:
                frequency[expert] += EXPERTS / options.active / len(sequence)
            share = share + affinities / len(sequence)
            partition = torch.logsumexp(layer.router.weight @ token, 0)
            total = total + options.z_loss * partition**2 / len(sequence)
        if options.balance == "loss":
            total = total + options.balance_weight * sum(f * p for f, p in zip(frequency, share, strict=True))
    return total


def gradients(layer: MixtureFeedForward, loss: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, (*layer.parameters(), *more)))


def accumulated(layer: MixtureFeedForward) -> list[torch.Tensor]:
    """The gradients of the parameters, which are cleared."""
    kept = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"active": 1},
        {"active": 2, "shared": 2},
        {"active": 3, "score": "sigmoid", "balance": "bias"},
        {"active": 1, "score": "sigmoid"},
        {"active": 5},
    ],
    ids=str,
)
def test_mixture_equals_a_loop_over_tokens(kind, options):
    layer, x = layer_of(kind, **options).eval(), tokens(2, 4).requires_grad_()
    if layer.choice_bias is not None:
        layer.choice_bias.copy_(torch.linspace(-0.5, 0.5, EXPERTS))
    expected = reference(layer, x)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    got, wanted = (gradients(layer, (y * weights).sum(), x) for y in (layer(x), expected))
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    "options", [{"z_loss": 0.3}, {"score": "sigmoid", "active": 3}, {"balance": "none", "z_loss": 0.1}], ids=str
)
def test_auxiliary_losses_are_those_of_the_papers(options):
    layer, x = layer_of(balance_weight=0.7, **options), tokens(3).requires_grad_()
    begin_step(layer, 0.25)
    got = gradients(layer, layer(x).square().sum(), x)
    expected = gradients(layer, reference(layer, x).square().sum() + 0.25 * auxiliary(layer, x), x)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)


def test_auxiliary_losses_are_for_training_alone():
    layer, x = layer_of(balance_weight=0.7, z_loss=0.3), tokens(3)
    expected = gradients(layer, reference(layer, x).sum())
    torch.testing.assert_close(gradients(layer.eval(), layer(x).sum()), expected)
    layer.train()
    with torch.no_grad():
        layer(x)
    assert loads(layer).sum() == 0


def test_without_a_scale_the_auxiliary_losses_are_a_mean_over_the_batch():
    layer, x = layer_of(balance_weight=0.7), tokens(3)
    unset = gradients(layer, layer(x).mean())
    begin_step(layer, 1 / 3)
    torch.testing.assert_close(unset, gradients(layer, layer(x).mean()))


@pytest.mark.parametrize("cut", [(1, 2, 3), (1,) * 6])
def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches(cut):
    layer, x = layer_of(balance_weight=0.7, z_loss=0.3, shared=1), tokens(6)

    def step(sizes):
        begin_step(layer, 1 / 6)
        for part in x.split(sizes):
            (layer(part).square().sum() / 6).backward()
        return accumulated(layer), loads(layer)

    whole, pieces = step([6]), step(list(cut))
    torch.testing.assert_close(pieces, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_gives_the_same_gradient_and_counts_once(reentrant):
    layer, x = layer_of(balance_weight=0.7, z_loss=0.3), tokens(6).requires_grad_()

    def step(run):
        begin_step(layer, 1 / 6)
        for part in x.split(2):
            run(part).square().sum().backward()
        return accumulated(layer), loads(layer)

    plain = step(layer)
    torch.testing.assert_close(step(lambda part: checkpoint(layer, part, use_reentrant=reentrant)), plain)
    assert plain[1].sum() == 6 * 7 * layer.options.active


def test_a_batch_without_sequences_gives_a_gradient_of_zero():
    layer = layer_of(balance_weight=0.7, z_loss=0.3)
    layer(tokens(0)).sum().backward()
    assert all(gradient.count_nonzero() == 0 for gradient in accumulated(layer))


def test_slices_of_the_hidden_layer_add_up_to_the_whole():
    """As tensor parallelism cuts it: outputs and router gradients are summed, auxiliary losses shared."""
    whole, x = layer_of(balance_weight=0.7, z_loss=0.3, active=3), tokens(4)
    begin_step(whole, 0.25)
    output = whole(x)
    slope = torch.randn_like(output)
    output.backward(slope)
    parts = [copy.deepcopy(whole) for _ in range(2)]
    outputs = []
    for part, half in zip(parts, (slice(0, 4), slice(4, HIDDEN)), strict=True):
        part.zero_grad()
        part.auxiliary_share = 0.5
        for name, stack in list(part.experts.named_parameters()):
            kept = stack[:, :, half] if name == "down" else stack[:, half]
            setattr(part.experts, name, torch.nn.Parameter(kept.detach().clone()))
        outputs.append(part(x))
        outputs[-1].backward(slope)
    torch.testing.assert_close(sum(outputs), output)
    torch.testing.assert_close(sum(part.router.weight.grad for part in parts), whole.router.weight.grad)
    up = torch.cat([part.experts.up.grad for part in parts], dim=1)
    torch.testing.assert_close(up, whole.experts.up.grad)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_choice_bias_balances_what_the_router_prefers(score):
    """Tokens share a direction that the router likes in the first experts; nothing is trained but the bias."""
    layer = layer_of(balance="bias", score=score, bias_rate=0.002)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.linspace(2, -2, EXPERTS)
    busiest = []
    for step in range(400):
        x = tokens(16, seed=step)
        x[..., 0] = 1
        begin_step(layer, 1.0)
        layer(x).sum().backward()
        busiest.append(busiest_expert(loads(layer)).item())
        balance_step(layer, loads(layer))
    assert busiest[0] > 1.5
    assert sum(busiest[-20:]) / 20 < 1.2
    assert layer.choice_bias.abs().max() > 0.1


def test_the_bias_moves_against_the_load_and_stays_where_it_is_even():
    layer = layer_of(balance="bias", bias_rate=0.5)
    balance_step(layer, torch.tensor([[4, 6, 5, 10, 0]]))
    assert layer.choice_bias.tolist() == [0.5, -0.5, 0.0, -0.5, 0.5]
    assert busiest_expert(torch.tensor([[1, 1, 1, 1, 1], [4, 6, 5, 10, 0]])).item() == 2.0


def test_the_balance_loss_balances_by_training():
    layer = layer_of(balance_weight=1.0)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.linspace(2, -2, EXPERTS)
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.5)
    x = tokens(16)
    x[..., 0] = 1
    busiest = []
    for _ in range(60):
        begin_step(layer, 1 / 16)
        (0 * layer(x).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        busiest.append(busiest_expert(loads(layer)).item())
    assert busiest[0] > 1.5
    assert busiest[-1] < 1.3


def test_every_operation_has_a_second_derivative():
    layer, x = layer_of(active=3, balance="none").eval(), tokens(1, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_grouped_kernel_equals_the_loop(dtype):
    """Its own CPU form: the CUDA kernel is another."""
    torch.manual_seed(0)
    rows = torch.randn(10, 16, dtype=dtype, requires_grad=True)
    matrices = torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)
    counts = torch.tensor([3, 0, 7, 0])
    results = []
    for product in (grouped_product, _grouped_kernel):
        y = product(rows, matrices, counts)
        results.append((y, *torch.autograd.grad(y.square().sum(), (rows, matrices))))
    torch.testing.assert_close(results[1], results[0])
    assert results[1][2][1].count_nonzero() == 0


def test_autocast_multiplies_in_its_dtype_and_routes_in_float32():
    layer, x = layer_of().float(), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        routing, y = layer.route(x), layer(x)
    assert (routing.logits.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(routing.logits, layer.route(x).logits)
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.03)


def test_the_options_are_checked():
    assert Mixture(experts=8).active == 2
    for wrong in ({"experts": 1}, {"experts": 4, "active": 5}, {"experts": 4, "active": 0}, {"experts": 4, "top": 2}):
        with pytest.raises(ValidationError):
            Mixture(**wrong)


def test_a_network_tells_its_layers_and_the_part_of_the_weights_that_a_token_meets():
    network = torch.nn.Sequential(FeedForward(WIDTH, HIDDEN), layer_of(), layer_of(balance="bias"))
    assert mixture_layers(network) == [network[1], network[2]]
    begin_step(network, 1.0)
    network.double()(tokens(2)).sum().backward()
    assert loads(network).sum(1).tolist() == [2 * 7 * 2] * 2
    assert network[1].experts.share_active == 2 / EXPERTS
    assert sorted(network[2].state_dict()) == [
        *("choice_bias", "experts.down", "experts.gate", "experts.up"),
        "router.weight",
    ]


def test_softmax_experts_equal_those_of_mixtral():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    theirs, ours = MixtralSparseMoeBlock(config).double(), layer_of().eval()
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight,
            "experts.gate_up_proj": torch.cat((ours.experts.gate, ours.experts.up), dim=1),
            "experts.down_proj": ours.experts.down,
        }
    )
    x = tokens()
    output = theirs(x)
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(ours(x), output, atol=1e-6, rtol=1e-6)  # theirs routes in float32

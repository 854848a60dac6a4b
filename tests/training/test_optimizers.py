"""Every optimizer of the recipe: its groups, its arithmetic against a reference, and its state through a checkpoint."""

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genscale.recipe import training as recipes
from genscale.runtime.errors import UserError
from genscale.training.optimizers import (
    build_optimizer,
    evaluation_weights,
    load_optimizer_state,
    optimizer_state,
    parameter_roles,
)

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs genscale[torchao]")

RECIPES = {
    "adamw": recipes.AdamW(),
    "muon": recipes.Muon(weight_decay=0.1),
    "muon, decayed ends": recipes.Muon(rest=recipes.AdamW(weight_decay=0.2)),
    "adafactor": recipes.Adafactor(weight_decay=0.1),
    "schedule_free": recipes.ScheduleFree(weight_decay=0.1),
}
EIGHT_BIT = {
    "adamw, 8 bits": recipes.AdamW(bits=8),
    "muon, rest in 8 bits": recipes.Muon(rest=recipes.AdamW(bits=8)),
}
EVERY = [
    *[pytest.param(recipe, id=name) for name, recipe in RECIPES.items()],
    *[pytest.param(recipe, id=name, marks=[needs_torchao, pytest.mark.slow]) for name, recipe in EIGHT_BIT.items()],
]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.stacked = nn.Linear(width, 3 * width, bias=False)
        self.stacked.output_pieces = (width, width, width)
        self.out = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.stacked(self.norm(x)).tanh())


class Network(nn.Module):
    def __init__(self, width: int = 16, vocabulary: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def new_network() -> Network:
    torch.manual_seed(0)
    return Network()


def train(network: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps that are a pure function of their number, the learning rate included."""
    for step in steps:
        tokens = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(step))
        logits = network(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * (1 - step / 100)
        optimizer.step()
        network.zero_grad(set_to_none=True)


def set_random_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_matrices_inside_blocks_are_decayed():
    network = new_network()
    assert parameter_roles(network) == {
        "embedding.weight": "ends",
        "blocks.0.norm.weight": "vectors",
        "blocks.0.norm.bias": "vectors",
        "blocks.0.stacked.weight": "matrices",
        "blocks.0.out.weight": "matrices",
        "blocks.0.out.bias": "vectors",
        "blocks.1.norm.weight": "vectors",
        "blocks.1.norm.bias": "vectors",
        "blocks.1.stacked.weight": "matrices",
        "blocks.1.out.weight": "matrices",
        "blocks.1.out.bias": "vectors",
        "norm.weight": "vectors",
        "norm.bias": "vectors",
        "head.weight": "ends",
    }
    groups = build_optimizer(network, recipes.AdamW(weight_decay=0.3)).param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("matrices", 0.3),
        ("ends", 0.0),
        ("vectors", 0.0),
    ]


def test_a_tied_head_and_embeddings_inside_blocks_are_ends():
    network = new_network()
    network.head.weight = network.embedding.weight
    network.blocks[0].table = nn.Embedding(3, 4)
    roles = parameter_roles(network)
    assert "head.weight" not in roles
    assert roles["embedding.weight"] == roles["blocks.0.table.weight"] == "ends"


def test_frozen_parameters_are_left_out():
    network = new_network()
    network.embedding.requires_grad_(False)
    held = {id(p) for group in build_optimizer(network, recipes.Muon()).param_groups for p in group["params"]}
    assert id(network.embedding.weight) not in held
    assert id(network.head.weight) in held


def test_muon_gives_each_part_its_own_learning_rate():
    recipe = recipes.Muon(learning_rate=0.05, rest=recipes.AdamW(learning_rate=0.004, weight_decay=0.2))
    groups = build_optimizer(new_network(), recipe).param_groups
    assert {group["name"]: (group["base_learning_rate"], group["weight_decay"]) for group in groups} == {
        "matrices": (0.05, 0.0),
        "ends": (0.004, 0.2),
        "vectors": (0.004, 0.0),
    }


def test_muon_without_matrices_is_refused():
    with pytest.raises(UserError, match=r"training\.optimizer: muon found no matrices.*use adamw"):
        build_optimizer(nn.Embedding(3, 4), recipes.Muon())


def test_eight_bits_without_torchao_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'genscale\[torchao\]'"):
        build_optimizer(new_network(), recipes.AdamW(bits=8))


@pytest.mark.parametrize("recipe", EVERY)
def test_training_goes_on_to_the_bit_after_a_checkpoint(recipe, tmp_path):
    straight = new_network()
    train(straight, build_optimizer(straight, recipe), range(20))

    first = new_network()
    optimizer = build_optimizer(first, recipe)
    train(first, optimizer, range(10))
    save_file({name: tensor.contiguous() for name, tensor in optimizer_state(optimizer, first).items()}, tmp_path / "o")
    save_file(first.state_dict(), tmp_path / "n")

    second = new_network()
    resumed = build_optimizer(second, recipe)
    second.load_state_dict(load_file(tmp_path / "n"))
    load_optimizer_state(resumed, second, load_file(tmp_path / "o"))
    assert same_weights(first, second)  # loading took no step
    again = optimizer_state(resumed, second)
    for name, tensor in optimizer_state(optimizer, first).items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    train(second, resumed, range(10, 20))
    assert same_weights(second, straight)
    assert not same_weights(first, second)


@pytest.mark.parametrize("recipe", EVERY)
def test_every_optimizer_learns(recipe):
    network = new_network()
    tokens = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(network, recipe)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    before = loss().item()
    for _ in range(30):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    with evaluation_weights(optimizer), torch.no_grad():
        assert loss().item() < 0.9 * before


def test_state_is_named_by_parameter_and_is_live():
    network = new_network()
    optimizer = build_optimizer(network, recipes.AdamW())
    assert optimizer_state(optimizer, network) == {}
    train(network, optimizer, range(1))
    state = optimizer_state(optimizer, network)
    assert state["blocks.1.out.weight.exp_avg"] is optimizer.state[network.blocks[1].out.weight]["exp_avg"]
    assert {name.rpartition(".")[0] for name in state} == set(dict(network.named_parameters()))


def test_loading_copies_and_replaces_what_was_there():
    network = new_network()
    optimizer = build_optimizer(network, recipes.AdamW())
    train(network, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_state(optimizer, network).items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    load_optimizer_state(optimizer, network, saved)
    train(network, optimizer, range(3, 5))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    load_optimizer_state(optimizer, network, {})  # a checkpoint of step 0
    assert optimizer_state(optimizer, network) == {}


def test_the_state_of_another_optimizer_is_refused():
    network = new_network()
    muon, adamw = build_optimizer(network, recipes.Muon()), build_optimizer(network, recipes.AdamW())
    train(network, adamw, range(1))
    state = optimizer_state(adamw, network)
    with pytest.raises(UserError, match=r"no optimizer state 'groups\.matrices\.bits'.*another optimizer"):
        load_optimizer_state(muon, network, state)
    with pytest.raises(UserError, match=r"'blocks\.7\.out\.weight\.step' fits nothing here"):
        load_optimizer_state(adamw, network, {**state, "blocks.7.out.weight.step": torch.zeros(())})


@pytest.mark.parametrize("recipe", EVERY)
def test_looking_at_evaluation_weights_never_changes_training(recipe):
    network = new_network()
    optimizer = build_optimizer(network, recipe)
    train(network, optimizer, range(3))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with evaluation_weights(optimizer):
        changed = any(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert changed == (recipe.kind == "schedule_free")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_adamw_equals_the_papers_formulas_over_fifty_steps():
    recipe = recipes.AdamW(learning_rate=0.01, beta1=0.8, beta2=0.9, weight_decay=0.5, epsilon=1e-6)
    network = new_network()
    optimizer = build_optimizer(network, recipe)
    roles = parameter_roles(network)
    weights = {name: parameter.detach().double() for name, parameter in network.named_parameters()}
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 51):
        factor = step / 50
        for group in optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * factor
        set_random_gradients(network, step)
        for name, parameter in network.named_parameters():
            gradient = parameter.grad.double()
            means[name] = 0.8 * means[name] + 0.2 * gradient
            squares[name] = 0.9 * squares[name] + 0.1 * gradient**2
            decay = 0.5 if roles[name] == "matrices" else 0.0
            update = (means[name] / (1 - 0.8**step)) / ((squares[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            weights[name] = weights[name] * (1 - 0.01 * factor * decay) - 0.01 * factor * update
        optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.double(), weights[name], atol=2e-6, rtol=0)


def test_fused_adamw_equals_torchs_foreach_adamw_over_fifty_steps():
    ours, theirs = new_network(), new_network()
    optimizer = build_optimizer(ours, recipes.AdamW(learning_rate=0.01, weight_decay=0.0))
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    for step in range(50):
        set_random_gradients(ours, step)
        set_random_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_adafactor_equals_the_one_of_transformers_over_fifty_steps():
    from transformers.optimization import Adafactor

    ours, theirs = new_network(), new_network()
    optimizer = build_optimizer(ours, recipes.Adafactor(learning_rate=1e-2))
    # Its relative step is min(1e-2, 1 / sqrt(t)) times the weights' root mean square: ours at that learning rate.
    reference = Adafactor(theirs.parameters(), lr=None, relative_step=True, scale_parameter=True)
    for step in range(50):
        set_random_gradients(ours, step)
        set_random_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@needs_torchao
@pytest.mark.slow
def test_adamw_in_eight_bits_stays_close_to_32_bits_over_fifty_steps():
    full, eight = new_network(), new_network()
    start = new_network()
    optimizers = [build_optimizer(full, recipes.AdamW()), build_optimizer(eight, recipes.AdamW(bits=8))]
    for step in range(50):
        for network, optimizer in zip((full, eight), optimizers, strict=True):
            set_random_gradients(network, step)
            for group in optimizer.param_groups:
                group["lr"] = group["base_learning_rate"] * (1 - step / 60)
            optimizer.step()
            assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
    state = optimizer_state(optimizers[1], eight)
    assert state["embedding.weight.exp_avg.codes"].dtype == torch.uint8
    assert state["norm.weight.exp_avg"].dtype == torch.float32  # small tensors keep 32 bits
    for name, weight in full.named_parameters():
        moved = (weight - start.get_parameter(name)).norm()
        assert (weight - eight.get_parameter(name)).norm() < 0.05 * moved

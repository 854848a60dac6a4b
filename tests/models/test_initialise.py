"""Initial weights are a pure function of the seed and the name."""

import math

import pytest
import torch
from torch import nn

from genscale.models.initialise import fan_in_std, initialise
from genscale.models.normalisation import Norm
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel


def weights(seed=0, layers=2, prefix="model", **options):
    shape = TransformerModel(layers=layers, width=64, heads=4, **options)
    network = Transformer(shape, 101)
    torch.rand(3)  # the global generator plays no part
    initialise(network, seed, prefix)
    return network.state_dict()


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    one, two = weights(), weights()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_layers_do_not_matter():
    # One scale for both depths: branch outputs are divided by a root of the depth, compared below.
    small, large = weights(layers=2), weights(layers=5)
    for name, value in small.items():
        if name.endswith(("output.weight", "down.weight")):
            value = value * math.sqrt(2 / 5)
            torch.testing.assert_close(value, large[name], atol=1e-8, rtol=1e-6)
        else:
            assert torch.equal(value, large[name])


def test_seed_name_and_prefix_all_count():
    one = weights()
    matrix = one["blocks.0.attention.query.weight"]
    assert not torch.equal(matrix, weights(seed=1)["blocks.0.attention.query.weight"])
    assert not torch.equal(matrix, weights(prefix="other")["blocks.0.attention.query.weight"])
    assert not torch.equal(matrix, one["blocks.1.attention.query.weight"])
    assert not torch.equal(matrix, one["blocks.0.attention.key.weight"])


def test_known_value_guards_against_a_change_of_the_rule():
    # Checkpoints do not depend on it, but every golden curve does.
    value = weights()["blocks.0.attention.query.weight"]
    assert value[0, :3].tolist() == pytest.approx([0.0057068048, 0.0016469925, 0.0190916657], abs=1e-8)


def test_the_rules():
    state = weights(
        initial_std=0.05, bias=True, query_key_value_bias=True, norm="layer", tied_head=False, positions="learned"
    )
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            branch = name.endswith(("output.weight", "down.weight"))
            expected = 0.05 / math.sqrt(2 * 2) if branch else 0.05
            assert value.std().item() == pytest.approx(expected, rel=0.05), name


def test_centred_norms_start_at_zero_and_output_layers_may():
    state = weights(norm_centred=True, zero_output_layers=True)
    assert not state["norm.weight"].any()
    assert not state["blocks.1.attention.output.weight"].any()
    assert not state["blocks.1.feed_forward.down.weight"].any()
    assert state["blocks.1.feed_forward.up.weight"].any()


class Zero(nn.Module):
    """A layer that begins at zero wherever it is."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def initial_std(self, name, size):
        assert name in ("inner.weight", "inner.bias")  # names are told as the module itself knows them
        return 0.0


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 80)
        self.convolution = nn.Conv2d(16, 32, 3)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), Norm(4), Norm(4, centred=True)])
        self.zero = Zero()
        self.encoder = Transformer(TransformerModel(layers=1, width=64, heads=2), 50)

    def initial_std(self, name, size):
        assert not name.startswith(("zero", "encoder", "norms"))
        return fan_in_std(name, size)


def test_the_nearest_module_that_has_a_rule_is_asked():
    network = Network()
    initialise(network, 0)
    state = network.state_dict()
    for name, fan_in in (("linear", 64), ("convolution", 16 * 9), ("grouped", 4 * 9)):
        assert state[f"{name}.weight"].std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert not state[f"{name}.bias"].any()
    assert [state[f"norms.{place}.weight"].unique().tolist() for place in range(3)] == [[1], [1], [0]]
    assert not state["zero.inner.weight"].any()
    assert not state["zero.inner.bias"].any()
    alone = Transformer(TransformerModel(layers=1, width=64, heads=2), 50)
    initialise(alone, 0, prefix="model.encoder")
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in alone.state_dict().items())


def test_a_network_without_a_rule_is_told_so():
    with pytest.raises(TypeError, match=r"Linear does not say how weight begins: it has no initial_std"):
        initialise(nn.Linear(2, 2), 0)

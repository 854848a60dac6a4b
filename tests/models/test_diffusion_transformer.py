"""The diffusion transformer against its equations in float64, and what its blocks begin as."""

import math

import pytest
import torch
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.diffusion_transformer import DiffusionBlock, DiffusionTransformer, image_of, patches_of
from genscale.models.grid_rotary import GridRotary
from genscale.models.initialise import initialise
from genscale.models.layers import AttentionMask
from genscale.recipe.image_model import DiffusionTransformerModel
from genscale.runtime.errors import UserError


def shape(**options):
    return DiffusionTransformerModel(**{"layers": 2, "width": 24, "heads": 3, "patch": 2} | options)


def awake(network):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.double()


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def turned(x, rows, columns, base=100.0):
    """(tokens, head_width), pair i being (i, i + half): each token's pairs turned by its row and by its column."""
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    pairs = torch.complex(x[:, :half], x[:, half:])
    for token in range(rows * columns):
        places = [token // columns] * quarter + [token % columns] * quarter
        for pair, place in enumerate(places):
            angle = place * base ** (-(pair % quarter) / quarter)
            pairs[token, pair] = pairs[token, pair] * complex(math.cos(angle), math.sin(angle))
    return torch.cat((pairs.real, pairs.imag), -1)


def block_by_the_book(state, x, condition, heads, rows, columns, rotary, query_key_norm):
    """Peebles and Xie 2023, figure 3 (adaLN-Zero), an image at a time and a head at a time."""
    result = []
    for image, told in zip(x, condition, strict=True):
        shift, scale, gate, shift_2, scale_2, gate_2 = linear(state, "modulation.linear", told).chunk(6)
        y = layer_norm(image) * (1 + scale) + shift
        answers = []
        for head in range(heads):
            part = slice(head * 8, head * 8 + 8)
            q, k, v = (linear(state, f"attention.{name}", y)[:, part] for name in ("query", "key", "value"))
            if query_key_norm:
                q, k = (
                    vector / (vector.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"attention.{name}.weight"]
                    for vector, name in ((q, "query_norm"), (k, "key_norm"))
                )
            if rotary:
                q, k = turned(q, rows, columns), turned(k, rows, columns)
            answers.append(torch.softmax(q @ k.T / math.sqrt(8), -1) @ v)
        image = image + gate * linear(state, "attention.output", torch.cat(answers, -1))
        y = layer_norm(image) * (1 + scale_2) + shift_2
        hidden = F.gelu(linear(state, "feed_forward.up", y), approximate="tanh")
        result.append(image + gate_2 * linear(state, "feed_forward.down", hidden))
    return torch.stack(result)


@pytest.mark.parametrize(("rotary", "query_key_norm"), [(True, True), (False, False)])
def test_a_block_is_that_of_the_paper(rotary, query_key_norm):
    block = awake(DiffusionBlock(shape(query_key_norm=query_key_norm)))
    rows, columns = 2, 3
    x, condition = torch.randn(2, 6, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    rotation = GridRotary(8)(rows, columns, x.device, x.dtype) if rotary else None
    found = block(x, AttentionMask(6, 6, causal=False), rotation, condition)
    expected = block_by_the_book(block.state_dict(), x, condition, 3, rows, columns, rotary, query_key_norm)
    torch.testing.assert_close(found, expected, atol=1e-6 if rotary else 1e-10, rtol=1e-6)  # angles are float32


def test_a_block_is_that_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.BasicTransformerBlock(
        24,
        3,
        8,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=5,
        norm_elementwise_affine=False,
    )
    ours = awake(DiffusionBlock(shape(query_key_norm=False)))
    state = ours.state_dict()
    names = {
        "norm1.linear": "modulation.linear",
        "attn1.to_q": "attention.query",
        "attn1.to_k": "attention.key",
        "attn1.to_v": "attention.value",
        "attn1.to_out.0": "attention.output",
        "ff.net.0.proj": "feed_forward.up",
        "ff.net.2": "feed_forward.down",
    }
    given = {f"{one}.{part}": state[f"{other}.{part}"] for one, other in names.items() for part in ("weight", "bias")}
    missing, unexpected = theirs.load_state_dict(given, strict=False)
    assert not unexpected
    assert all("emb" in name for name in missing)  # what turns steps and classes into the condition
    theirs = theirs.double().eval()
    # The paper's two norms have an epsilon of 1e-6; diffusers gives the second one 1e-5 where it is not told.
    theirs.norm3.eps = theirs.norm1.norm.eps = 1e-6
    told = theirs.norm1.emb(torch.tensor([3, 700]), torch.tensor([0, 4]), hidden_dtype=torch.float64)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    expected = theirs(x, timestep=torch.tensor([3, 700]), class_labels=torch.tensor([0, 4]))
    found = ours(x, AttentionMask(6, 6, causal=False), None, F.silu(told))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_every_block_begins_as_the_identity(positions):
    network = DiffusionTransformer(shape(positions=positions), ImageDescription(3, 8))
    initialise(network, 0)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
    network(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert len(seen) == 2
    assert all(torch.equal(*pair) for pair in seen)
    assert seen[0][0].std() > 0.5


def test_patches_are_cut_row_by_row_and_put_back():
    images = torch.randn(2, 3, 6, 9)
    patches = patches_of(images, 3)
    assert patches.shape == (2, 6, 27)
    for row in range(2):
        for column in range(3):
            cut = images[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert torch.equal(patches[:, row * 3 + column], cut.reshape(2, 27))
    assert torch.equal(image_of(patches, 3, rows=2), images)


def test_rotary_positions_know_left_from_right_and_take_other_sizes():
    network = awake(DiffusionTransformer(shape(), ImageDescription(1, 8)))
    x, level = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.rand(1)
    assert not torch.allclose(network(x.flip(3), level).flip(3), network(x, level), atol=1e-3)
    assert network(torch.randn(1, 1, 12, 4, dtype=torch.float64), level).shape == (1, 1, 12, 4)


def test_learned_positions_are_what_tells_patches_apart():
    network = awake(DiffusionTransformer(shape(positions="learned"), ImageDescription(1, 8)))
    x, level = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.rand(1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def shuffled(images):
        return image_of(patches_of(images, 2)[:, order], 2, rows=4)

    assert not torch.allclose(network(shuffled(x), level), shuffled(network(x, level)), atol=1e-3)
    with torch.no_grad():
        network.position_embedding.weight.zero_()
    torch.testing.assert_close(network(shuffled(x), level), shuffled(network(x, level)))


@pytest.mark.parametrize(("resolution", "patch", "fit"), [(28, 8, "1, 2, 4, 7 and 14"), (7, 2, "1"), (9, 6, "1 and 3")])
def test_a_patch_that_does_not_divide_is_one_clear_line(resolution, patch, fit):
    with pytest.raises(UserError, match=rf"^model.patch: {patch} does not divide .* {resolution} .*; {fit} do"):
        DiffusionTransformer(shape(patch=patch), ImageDescription(1, resolution))

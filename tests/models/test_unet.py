"""The UNet against diffusers' and against what its parts are by definition."""

import pytest
import torch

from genscale.data.description import ImageDescription
from genscale.models.initialise import initialise
from genscale.models.unet import ResidualBlock, UNet
from genscale.recipe.image_model import UNetModel
from genscale.runtime.errors import UserError


def shape(**options):
    return UNetModel(**{"width": 8, "multipliers": (1, 2, 2), "blocks": 1, "head_width": 8} | options)


def awake(network):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def diffusers_names(shape):
    """Our names of blocks as diffusers' UNet2DModel has them."""
    residual = {
        "norm_1": "norm1",
        "convolution_1": "conv1",
        "modulation": "time_emb_proj",
        "norm_2": "norm2",
        "convolution_2": "conv2",
        "shortcut": "conv_shortcut",
    }
    attention = {
        "norm": "group_norm",
        "attention.query": "to_q",
        "attention.key": "to_k",
        "attention.value": "to_v",
        "attention.output": "to_out.0",
    }
    names = {
        "condition.noise.up": "time_embedding.linear_1",
        "condition.noise.down": "time_embedding.linear_2",
        "condition.classes": "class_embedding",
        "input": "conv_in",
        "norm": "conv_norm_out",
        "output": "conv_out",
    }
    levels = len(shape.multipliers)
    places = [(f"middle.{i}", "mid_block", i) for i in range(2)]
    for level in range(levels):
        places += [(f"down.{level}.{i}", f"down_blocks.{level}", i) for i in range(shape.blocks)]
        places += [(f"up.{level}.{i}", f"up_blocks.{level}", i) for i in range(shape.blocks + 1)]
        names[f"downsamples.{level}"] = f"down_blocks.{level}.downsamplers.0.conv"
        names[f"upsamples.{level}.convolution"] = f"up_blocks.{level}.upsamplers.0.conv"
    for ours, theirs, place in places:
        names |= {f"{ours}.residual.{a}": f"{theirs}.resnets.{place}.{b}" for a, b in residual.items()}
        names |= {f"{ours}.attention.{a}": f"{theirs}.attentions.{place}.{b}" for a, b in attention.items()}
    return names


@pytest.mark.parametrize(
    ("options", "resolution"),
    [({}, 12), ({"blocks": 2, "multipliers": (1, 3), "attention": (0, 1)}, 8), ({"width": 64, "attention": ()}, 8)],
)
def test_the_network_is_that_of_diffusers(options, resolution):
    diffusers = pytest.importorskip("diffusers")
    ours_shape = shape(**options)
    ours = awake(UNet(ours_shape, ImageDescription(3, resolution, ("a", "b")), "class")).double()
    levels = range(len(ours_shape.multipliers))
    attends = [level in ours_shape.attention for level in levels]
    groups = min(32, ours_shape.width)
    theirs = diffusers.UNet2DModel(
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        layers_per_block=ours_shape.blocks,
        block_out_channels=tuple(ours_shape.width * m for m in ours_shape.multipliers),
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        attention_head_dim=8,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=3,
    ).double()
    names = diffusers_names(ours_shape)
    state = {}
    for name, value in ours.state_dict().items():
        layer, _, part = name.rpartition(".")
        state[f"{names[layer]}.{part}"] = value
    theirs.load_state_dict(state)
    x, steps, labels = torch.randn(2, 3, resolution, resolution).double(), torch.tensor([7, 640]), torch.tensor([1, 2])
    expected = theirs(x, steps, labels).sample
    torch.testing.assert_close(
        ours(x, steps / 1000, labels), expected, atol=1e-4, rtol=1e-4
    )  # their angles are float32


@pytest.mark.parametrize(("resolution", "levels"), [(28, 3), (32, 4), (64, 5), (7, 1), (4, 3)])
def test_resolutions_that_halve_are_taken(resolution, levels):
    network = UNet(shape(multipliers=(1,) * levels, attention=(levels - 1,)), ImageDescription(1, resolution))
    sizes = []
    network.middle[0].register_forward_hook(lambda _, given, result: sizes.append(tuple(result.shape[2:])))
    assert network(torch.randn(2, 1, resolution, resolution), torch.rand(2)).shape == (2, 1, resolution, resolution)
    assert sizes == [(resolution // 2 ** (levels - 1),) * 2]


@pytest.mark.parametrize(("resolution", "levels", "most"), [(28, 4, 3), (7, 2, 1), (30, 3, 2), (32, 7, 6)])
def test_a_resolution_that_does_not_is_one_clear_line(resolution, levels, most):
    message = rf"^model.multipliers: {levels} levels halve .* resolution of {resolution} .* at most {most}"
    with pytest.raises(UserError, match=message):
        UNet(shape(multipliers=(1,) * levels, attention=()), ImageDescription(1, resolution))


def test_heads_that_do_not_fit_the_middle_are_found_in_the_recipe():
    with pytest.raises(ValueError, match=r"head_width \(64\) must divide the channels of the middle, 96"):
        UNetModel(width=48, attention=())
    with pytest.raises(ValueError, match="multipliers"):
        UNetModel(multipliers=(1, 0))


def test_residual_blocks_begin_as_their_shortcut():
    network = UNet(shape(), ImageDescription(1, 8))
    initialise(network, 0)
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for block in blocks:
        x = torch.randn(2, block.norm_1.num_channels, 4, 4)
        expected = x if block.shortcut is None else block.shortcut(x)
        torch.testing.assert_close(block(x, torch.randn(2, 32)), expected)
    assert len(blocks) == 3 + 2 + 6


def test_an_answer_sees_the_whole_image():
    network = awake(UNet(shape(), ImageDescription(1, 16)))
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    network(x, torch.rand(1))[0, 0, 8, 8].backward()
    assert (x.grad != 0).all()

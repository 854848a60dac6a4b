"""What both networks for denoising promise: where they begin, what they depend on, and that all of them learns."""

import pytest
import torch
from torch.nn import functional as F

from genscale.data.description import ImageDescription
from genscale.models.blocks import set_recompute
from genscale.models.denoiser import build_denoiser
from genscale.models.diffusion_transformer import DiffusionTransformer
from genscale.models.initialise import initialise
from genscale.models.unet import UNet
from genscale.recipe.image_model import DiffusionTransformerModel, TextEncoder, UNetModel

TEXT = TextEncoder(layers=1, width=8, heads=2)
SHAPES = {
    "transformer": DiffusionTransformerModel(layers=2, width=16, heads=2, patch=2, text_encoder=TEXT),
    "learned": DiffusionTransformerModel(
        layers=1, width=12, heads=2, patch=4, positions="learned", query_key_norm=False, feed_forward="swiglu"
    ),
    "unet": UNetModel(width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_width=8, text_encoder=TEXT),
}
ALL = pytest.mark.parametrize("name", list(SHAPES))


def described(resolution=8):
    return ImageDescription(2, resolution, ("a", "b", "c"), caption_vocabulary=300, caption_tokens=5)


def denoiser(name, kind="class", augmentation_width=3, seed=0, resolution=8, **options):
    shape = SHAPES[name].model_copy(update=options)
    network = build_denoiser(shape, described(resolution), kind, augmentation_width)
    initialise(network, seed)
    return network


def awake(network):
    """With every parameter moved from where it begins, as after some training."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(batch=3, resolution=8):
    torch.manual_seed(5)
    return {
        "x": torch.randn(batch, 2, resolution, resolution),
        "noise_level": torch.rand(batch),
        "labels": torch.arange(batch) % 4,
        "captions": torch.randint(0, 300, (batch, 5)),
        "augmentation": torch.randn(batch, 3),
    }


def test_the_shape_names_the_network():
    assert isinstance(denoiser("transformer"), DiffusionTransformer)
    assert isinstance(denoiser("unet"), UNet)


@ALL
def test_the_answer_begins_at_zero(name):
    answer = denoiser(name)(**inputs())
    assert answer.shape == (3, 2, 8, 8)
    assert not answer.any()


@ALL
@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_every_weight_learns_within_a_few_steps(name, kind):
    # What is behind a closed gate learns when the gate has opened: three steps from the answer to the first layer.
    network, given = denoiser(name, kind), inputs(batch=8)
    target = torch.randn(8, 2, 8, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(network(**given), target)
        loss.backward()
        optimizer.step()
    asleep = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    # Softmax does not see what is the same for all keys.
    assert [name for name in asleep if not name.endswith("key.bias")] == []
    assert loss < 0.99 * target.square().mean()


@ALL
def test_an_image_is_answered_by_itself(name):
    network, given = awake(denoiser(name, "text")), inputs(batch=5)
    together = network(**given)
    apart = torch.cat([network(**{key: value[i : i + 1] for key, value in given.items()}) for i in range(5)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@ALL
def test_all_that_is_told_counts(name):
    for kind, key in (("class", "labels"), ("text", "captions")):
        network, given = awake(denoiser(name, kind)), inputs()
        answer = network(**given)
        for other in (key, "noise_level", "augmentation", "x"):
            changed = given | {other: given[other].flip(0)}
            assert not torch.allclose(network(**changed), answer, atol=1e-4), other
        for untold in {"labels", "captions"} - {key}:
            assert torch.equal(network(**given | {untold: None}), answer)


@ALL
def test_a_caption_is_read_word_by_word(name):
    network, given = awake(denoiser(name, "text")), inputs(batch=2)
    network.condition.caption.output.weight.data.zero_()  # so that nothing goes by the mean of the words
    captions = torch.tensor([[5, 9, 2, 0, 0], [4, 7, 0, 0, 0]])

    def answer(captions):
        return network(**given | {"captions": captions})

    told, untold = answer(captions), answer(None)
    assert not torch.allclose(told, untold, atol=1e-4)
    torch.testing.assert_close(answer(torch.zeros(2, 5, dtype=torch.long)), untold, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer(captions[:, :3]), told, atol=1e-5, rtol=1e-5)  # padding is not read
    one_left_out = answer(captions * torch.tensor([[1], [0]]))
    torch.testing.assert_close(one_left_out, torch.stack((told[0], untold[1])), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer(torch.tensor([[9, 5, 2, 0, 0], [4, 7, 0, 0, 0]]))[0], told[0], atol=1e-4)


@ALL
def test_weights_are_a_function_of_the_seed_and_the_name(name):
    torch.rand(3)
    one, two, other = (denoiser(name, seed=seed).state_dict() for seed in (0, 0, 1))
    plain = denoiser(name, "none", 0, resolution=16).state_dict()
    for key, value in one.items():
        assert torch.equal(value, two[key])
        assert torch.equal(value, other[key]) == (len(value.unique()) == 1), key  # zeros and ones are no draws
        if key in plain and "position" not in key:
            assert torch.equal(value, plain[key])


@ALL
@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}])
def test_recomputation_changes_no_gradient_and_keeps_less(name, options):
    gradients, kept = [], []
    for recompute in ("none", "full", "selective"):
        network, sizes = awake(denoiser(name, **options)), []
        set_recompute(network, recompute)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=sizes: into.append(x.numel()) or x, lambda x: x):
            answer = network(**inputs())
        kept.append(sum(sizes))
        answer.square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, *others in zip(*gradients, strict=True):
        assert all(torch.equal(one, other) for other in others)
    assert kept[1] < kept[0] / 2


@ALL
def test_autocast_gives_nearly_the_same_in_the_images_own_dtype(name):
    network, given = awake(denoiser(name)), inputs()
    exact = network(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(**given)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.05 * exact.norm()
    assert network.to(torch.bfloat16)(**given | {"x": given["x"].bfloat16()}).dtype == torch.bfloat16


@ALL
def test_dropout_is_off_in_evaluation(name):
    network, given = awake(denoiser(name, dropout=0.3)), inputs()
    assert not torch.equal(network(**given), network(**given))
    network.eval()
    assert torch.equal(network(**given), network(**given))

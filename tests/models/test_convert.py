"""Our logits equal those of transformers for the same weights, and weights survive the way there and back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from genscale.models.convert import from_transformers, to_transformers
from genscale.models.initialise import initialise
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel
from genscale.runtime.errors import UserError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2),
    "gpt2 untied, exact gelu": GPT2Config(
        vocab_size=97,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        n_inner=70,
        activation_function="gelu",
        tie_word_embeddings=False,
        initializer_range=0.2,
    ),
    "llama 3": LlamaConfig(**SMALL, rope_parameters=STRETCHED),
    "llama 3 tied, with biases": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen 3": Qwen3Config(**SMALL),
    "qwen 3 tied, with a window": Qwen3Config(
        **SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "gemma 2": Gemma2Config(
        **SMALL,
        query_pre_attn_scalar=24,
        sliding_window=9,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
        attn_implementation="eager",
    ),
    "gemma 2 untied, uncapped": Gemma2Config(
        **SMALL,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attn_implementation="eager",
    ),
}


def published(name):
    """A model of theirs with random weights everywhere, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(std=0.3).add_(0.0 if "gemma" in name else 0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    theirs = published(name)
    shape, vocabulary, state = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    ours = Transformer(shape, vocabulary).eval()
    ours.load_state_dict(state)
    tokens = torch.randint(97, (2, 50))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # a comparison of something
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_there_and_back_are_the_same_to_the_bit(name):
    theirs = published(name)
    shape, vocabulary, state = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    config, back = to_transformers(shape, vocabulary, state, theirs.config.model_type)
    original = theirs.state_dict()
    if shape.tied_head:
        original.pop("lm_head.weight")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)
    assert from_transformers(config, back).shape == shape


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_a_network_of_ours_runs_in_transformers(family):
    options = {"layers": 2, "width": 48, "heads": 4, "context": 64, "initial_std": 0.2, "dropout": 0.1}
    options |= {
        "gpt2": {
            "norm": "layer",
            "bias": True,
            "query_key_value_bias": True,
            "positions": "learned",
            "feed_forward": "gelu_tanh",
        },
        "llama": {"key_value_heads": 2, "tied_head": False},
        "qwen3": {"query_key_norm": True},
        "gemma2": {
            "feed_forward": "geglu",
            "norm_centred": True,
            "post_norm": True,
            "embedding_scale": 48**0.5,
            "sliding_window": 5,
            "sliding_window_layers": "even",
            "attention_soft_cap": 4.0,
            "logit_soft_cap": 3.0,
        },
    }[family]
    ours = Transformer(TransformerModel(**options), 97).eval()
    initialise(ours, 0)
    config, state = to_transformers(ours.shape, 97, ours.state_dict(), family)
    configuration = {"gpt2": GPT2Config, "llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config}[family]
    theirs = AutoModelForCausalLM.from_config(configuration(**config, attn_implementation="eager")).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    theirs.tie_weights()
    tokens = torch.randint(97, (2, 30))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_published_gpt2_files_without_prefix_and_with_mask_buffers_load():
    theirs = published("gpt2")
    state = {name.removeprefix("transformer."): value for name, value in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    converted = from_transformers(theirs.config.to_dict(), state)
    Transformer(converted.shape, 97).load_state_dict(converted.state)


def test_configurations_written_by_transformers_4_are_read():
    config = {"model_type": "llama", **SMALL, "rope_theta": 5000.0, "rope_scaling": STRETCHED | {"rope_theta": 5000.0}}
    config["rope_scaling"].pop("rope_theta")
    theirs = published("llama 3")
    expected = from_transformers(theirs.config.to_dict(), theirs.state_dict()).shape
    found = from_transformers(config | {"rms_norm_eps": 1e-6}, theirs.state_dict()).shape
    assert found == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not known, did you mean 'llama'"),
        ({"hidden_act": "relu"}, "Llama with hidden_act: relu is not supported, only silu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: yarn is not supported"),
        ({"attention_bias": True}, "Llama with mlp_bias: False is not supported, only True"),
        ({"vocab_size": 98}, "'embed_tokens.weight' has shape (97, 48), expected (98, 48)"),
        ({"num_hidden_layers": 4}, "lack 'layers.3.input_layernorm.weight'"),
        ({"num_hidden_layers": 2}, "'layers.2.self_attn.q_proj.weight' has no place"),
    ],
)
def test_what_cannot_be_converted_is_named(change, message):
    theirs = published("llama 3")
    with pytest.raises(UserError) as error:
        from_transformers(theirs.config.to_dict() | change, theirs.state_dict())
    assert message in str(error.value)


def test_a_shape_that_a_family_cannot_express_is_refused():
    ours = Transformer(TransformerModel(layers=1, width=16, heads=2, feed_forward="relu_squared"), 11)
    with pytest.raises(UserError, match=r"Llama cannot express model\.feed_forward: relu_squared, only swiglu"):
        to_transformers(ours.shape, 11, ours.state_dict(), "llama")
    with pytest.raises(UserError, match="Qwen 3 cannot express"):
        to_transformers(ours.shape, 11, ours.state_dict(), "qwen3")

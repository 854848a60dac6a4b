"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch

from genscale.models.convert.family import Config, Family, State, only, required
from genscale.recipe.model import TransformerModel
from genscale.runtime.errors import UserError

_GPT2_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def _gpt2_shape(config: Config) -> TransformerModel:
    only(
        config,
        "GPT-2",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise UserError(f"config.json: GPT-2 with activation_function: {activation} is not supported")
    return TransformerModel(
        layers=required(config, "n_layer"),
        width=required(config, "n_embd"),
        heads=required(config, "n_head"),
        hidden=config.get("n_inner") or 4 * config["n_embd"],
        feed_forward=_GPT2_ACTIVATIONS[activation],
        norm="layer",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        bias=True,
        query_key_value_bias=True,
        positions="learned",
        context=required(config, "n_positions"),
        tied_head=config.get("tie_word_embeddings", True),
        dropout=config.get("resid_pdrop", 0.1),
        initial_std=config.get("initializer_range", 0.02),
    )


def _gpt2_config(shape: TransformerModel) -> dict[str, Any]:
    return {
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "n_inner": shape.width_of_hidden,
        "n_positions": shape.context,
        "activation_function": "gelu" if shape.feed_forward == "gelu" else "gelu_new",
        "layer_norm_epsilon": shape.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), shape.dropout),
    }


_GPT2_MODULES = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    "attention.query": "attn.query",  # of attn.c_attn, see _gpt2_split
    "attention.key": "attn.key",
    "attention.value": "attn.value",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
_GPT2_TRANSPOSED = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")  # its Conv1D keeps (inputs, outputs)


def _gpt2_split(state: State) -> State:
    """One projection to queries, keys and values becomes three; matrices become (outputs, inputs)."""
    split: State = {}
    for name, tensor in state.items():
        matrix = tensor.T if _GPT2_TRANSPOSED.fullmatch(name) else tensor
        if ".attn.c_attn." in name:
            for part, piece in zip(("query", "key", "value"), matrix.chunk(3), strict=True):
                split[name.replace("c_attn", part)] = piece
        else:
            split[name] = matrix
    return split


def _gpt2_merge(state: State) -> State:
    merged: State = {}
    for name, tensor in state.items():
        if ".attn.query." in name:
            tensor = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("query", "c_attn")
        elif ".attn.key." in name or ".attn.value." in name:
            continue
        merged[name] = tensor.T.contiguous() if _GPT2_TRANSPOSED.fullmatch(name) else tensor
    return merged


GPT2 = Family(
    "GPT-2",
    "GPT2LMHeadModel",
    _gpt2_shape,
    _gpt2_config,
    _GPT2_MODULES,
    prefix="transformer.",
    layers="h",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    split=_gpt2_split,
    merge=_gpt2_merge,
)

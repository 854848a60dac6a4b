"""Llama 3 (Grattafiori et al. 2024), Qwen 3 and Gemma 2, which share most of their names."""

from __future__ import annotations

from typing import Any, Literal

import torch

from genscale.models.convert.family import Config, Family, only, required
from genscale.models.transformer import Transformer
from genscale.recipe.model import RotaryScaling, TransformerModel
from genscale.runtime.errors import UserError


def _rotary(config: Config) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if rope is None:  # as written by transformers 4
        rope = {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    options: dict[str, Any] = {"rotary_base": rope.get("rope_theta", 10_000.0)}
    if kind == "llama3":
        options["rotary_scaling"] = RotaryScaling(
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise UserError(f"config.json: rope_type: {kind} is not supported, only default and llama3")
    return options


def _rope_parameters(shape: TransformerModel) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if (scaling := shape.rotary_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return rope


def _windows(config: Config, layers: int, default: Literal["all", "even"]) -> dict[str, Any]:
    """The sliding window, and the layers that have it, from ``layer_types``."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return {}
    which: dict[str, list[int]] = {
        "all": list(range(layers)),
        "even": list(range(0, layers, 2)),
        "odd": list(range(1, layers, 2)),
    }
    sliding = which[default] if kinds is None else [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    for name, expected in which.items():
        if sliding == expected:
            return {"sliding_window": window, "sliding_window_layers": name}
    raise UserError(f"config.json: layer_types with a sliding window in layers {sliding} are not supported")


def _layer_types(shape: TransformerModel) -> list[str]:
    with torch.device("meta"):
        window_of = Transformer(shape, 1).window_of
    return ["full_attention" if window_of(i) is None else "sliding_attention" for i in range(shape.layers)]


def _llama_shape(config: Config, **more: Any) -> TransformerModel:
    """What Llama, Qwen 3 and Gemma 2 have in common, and ``more``."""
    only(config, str(config["model_type"]), partial_rotary_factor=1.0)
    return TransformerModel(
        layers=required(config, "num_hidden_layers"),
        width=required(config, "hidden_size"),
        heads=required(config, "num_attention_heads"),
        key_value_heads=config.get("num_key_value_heads"),
        head_width=config.get("head_dim"),
        hidden=required(config, "intermediate_size"),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        context=required(config, "max_position_embeddings"),
        initial_std=config.get("initializer_range", 0.02),
        **_rotary(config),
        **more,
    )


def _llama_config(shape: TransformerModel) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads or shape.heads,
        "head_dim": shape.width_of_head,
        "intermediate_size": shape.width_of_hidden,
        "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": shape.context,
        "rope_parameters": _rope_parameters(shape),
    }


def _llama3_shape(config: Config) -> TransformerModel:
    bias = bool(config.get("attention_bias", False))
    only(config, "Llama", hidden_act="silu", mlp_bias=bias)
    tied = config.get("tie_word_embeddings", False)
    return _llama_shape(config, bias=bias, query_key_value_bias=bias, tied_head=tied)


def _llama3_config(shape: TransformerModel) -> dict[str, Any]:
    return {**_llama_config(shape), "hidden_act": "silu", "attention_bias": shape.bias, "mlp_bias": shape.bias}


def _qwen3_shape(config: Config) -> TransformerModel:
    only(config, "Qwen 3", hidden_act="silu", attention_bias=False)
    windows = _windows(config, config["num_hidden_layers"], "all") if config.get("use_sliding_window") else {}
    return _llama_shape(config, query_key_norm=True, tied_head=config.get("tie_word_embeddings", False), **windows)


def _qwen3_config(shape: TransformerModel) -> dict[str, Any]:
    return {
        **_llama_config(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": shape.sliding_window is not None,
        "sliding_window": shape.sliding_window,
        "layer_types": _layer_types(shape),
    }


def _gemma2_shape(config: Config) -> TransformerModel:
    only(config, "Gemma 2", hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    return _llama_shape(
        config,
        feed_forward="geglu",
        norm_centred=True,
        post_norm=True,
        query_scale=config.get("query_pre_attn_scalar", 256),
        attention_soft_cap=config.get("attn_logit_softcapping", 50.0),
        logit_soft_cap=config.get("final_logit_softcapping", 30.0),
        embedding_scale=required(config, "hidden_size") ** 0.5,
        tied_head=config.get("tie_word_embeddings", True),
        **_windows(config, config["num_hidden_layers"], "even"),
    )


def _gemma2_config(shape: TransformerModel) -> dict[str, Any]:
    return {
        **_llama_config(shape),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": shape.query_scale or shape.width_of_head,
        "attn_logit_softcapping": shape.attention_soft_cap,
        "final_logit_softcapping": shape.logit_soft_cap,
        "sliding_window": shape.sliding_window,
        "layer_types": _layer_types(shape),
    }


_LLAMA_MODULES = {
    "embedding": "embed_tokens",
    "norm": "norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_GEMMA2_MODULES = _LLAMA_MODULES | {
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}


LLAMA = Family("Llama", "LlamaForCausalLM", _llama3_shape, _llama3_config, _LLAMA_MODULES)
QWEN3 = Family("Qwen 3", "Qwen3ForCausalLM", _qwen3_shape, _qwen3_config, _LLAMA_MODULES)
GEMMA2 = Family("Gemma 2", "Gemma2ForCausalLM", _gemma2_shape, _gemma2_config, _GEMMA2_MODULES)

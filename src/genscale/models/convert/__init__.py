"""Weights and shapes to and from the transformers library: GPT-2, Llama 3, Qwen 3 and Gemma 2.

Configurations are plain dictionaries as in ``config.json``, states are dictionaries of tensors as in a safetensors
file; the library itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscale.models.convert.family import Config, Family, State, required
from genscale.models.convert.gpt2 import GPT2
from genscale.models.convert.llama import GEMMA2, LLAMA, QWEN3
from genscale.models.transformer import Transformer
from genscale.recipe.model import TransformerModel
from genscale.runtime.errors import UserError, nearest

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "gemma2": GEMMA2}
"""By transformers' ``model_type``."""


class Converted(NamedTuple):
    shape: TransformerModel
    vocabulary: int
    state: State
    """For ``Transformer(shape, vocabulary).load_state_dict``."""


def from_transformers(config: Config, state: Mapping[str, Tensor]) -> Converted:
    """Shape, vocabulary and state of a model that transformers wrote; the tensors share memory where they can."""
    family = _family(str(config.get("model_type")))
    shape = family.shape_of(config)
    vocabulary = int(required(config, "vocab_size"))
    theirs = {name.removeprefix(family.prefix): tensor for name, tensor in state.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not re.fullmatch(family.ignored, name)}
    if shape.tied_head:
        theirs.pop("lm_head.weight", None)
    theirs = family.split(theirs)

    ours: State = {}
    for name, expected in _expected(shape, vocabulary).items():
        their_name = _rename(name, family)
        if their_name not in theirs:
            raise UserError(f"the {family.name} weights lack '{their_name}'{nearest(their_name, list(theirs))}")
        ours[name] = theirs.pop(their_name)
        if ours[name].shape != expected:
            found = tuple(ours[name].shape)
            raise UserError(f"{family.name} weight '{their_name}' has shape {found}, expected {tuple(expected)}")
    if theirs:
        raise UserError(f"{family.name} weight '{next(iter(theirs))}' has no place in a model of that configuration")
    return Converted(shape, vocabulary, ours)


def to_transformers(
    shape: TransformerModel, vocabulary: int, state: Mapping[str, Tensor], family: str
) -> tuple[dict[str, Any], State]:
    """The configuration and state by which transformers builds the same model.

    Raises:
        UserError: the family cannot express the shape; names the first option that it cannot.
    """
    chosen = _family(family)
    config = {"model_type": family, "architectures": [chosen.architecture], "vocab_size": vocabulary}
    config |= {
        "tie_word_embeddings": shape.tied_head,
        "initializer_range": shape.initial_std,
        **chosen.config_of(shape),
    }
    wanted, expressed = _canonical(shape), _canonical(chosen.shape_of(config))
    for option, value in wanted.items():
        if expressed[option] != value:
            raise UserError(f"{chosen.name} cannot express model.{option}: {value}, only {expressed[option]}")
    named = {_rename(name, chosen): state[name] for name in _expected(shape, vocabulary)}
    merged = chosen.merge(named)
    return config, {name if name.startswith("lm_head") else chosen.prefix + name: merged[name] for name in merged}


def _expected(shape: TransformerModel, vocabulary: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(shape, vocabulary).state_dict().items()}


def _rename(name: str, family: Family) -> str:
    """Their name, without the prefix, of our parameter."""
    module, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return f"{family.layers}.{match[1]}.{family.modules[match[2]]}.{kind}"
    return f"{family.modules[module]}.{kind}"


def _canonical(shape: TransformerModel) -> dict[str, Any]:
    """The shape's options with defaults resolved and those that change no logits left out."""
    options = shape.model_dump(exclude={"initial_std", "zero_output_layers", "dropout", "within_documents", "kind"})
    options |= {"head_width": shape.width_of_head, "hidden": shape.width_of_hidden}
    options["key_value_heads"] = shape.key_value_heads or shape.heads
    options["query_scale"] = shape.query_scale or float(shape.width_of_head)
    if shape.positions != "rotary":
        options |= {"rotary_base": None, "rotary_scaling": None}
    if shape.sliding_window is None:
        options["sliding_window_layers"] = None
    return options


def _family(name: str) -> Family:
    if name not in FAMILIES:
        known = list(FAMILIES)
        raise UserError(f"model_type '{name}' is not known{nearest(name, known)}; known: {', '.join(known)}")
    return FAMILIES[name]

"""What distinguishes a family of published models: how its configuration and its weights are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genscale.recipe.model import TransformerModel
from genscale.runtime.errors import UserError, nearest

State = dict[str, Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str
    shape_of: Callable[[Config], TransformerModel]
    config_of: Callable[[TransformerModel], dict[str, Any]]
    modules: dict[str, str]
    """Our module's name to theirs, within the model or within a layer."""
    prefix: str = "model."
    layers: str = "layers"
    ignored: str = r".*\.rotary_emb\.inv_freq"
    """Their buffers, which hold nothing learned."""
    split: Callable[[State], State] = lambda state: state
    merge: Callable[[State], State] = lambda state: state


def required(config: Config, key: str) -> Any:
    if key not in config:
        raise UserError(f"config.json lacks '{key}'{nearest(key, list(config))}")
    return config[key]


def only(config: Config, family: str, **expected: Any) -> None:
    """Refuse options that our layers do not have; a key that is absent has its expected value."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json: {family} with {key}: {config[key]} is not supported, only {value}")

"""AdamW with its state in 8 bits (Dettmers et al. 2022), through torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.runtime.errors import UserError


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> torch.optim.Optimizer:
    """torchao's AdamW; raises UserError when torchao is not installed. Tensors below 4096 elements keep 32 bits."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "training.optimizer: bits: 8 needs torchao, which is not installed: pip install 'genscale[torchao]'"
        ) from None
    optimizer = AdamW8bit(groups, betas=betas, eps=epsilon)
    # torchao compiles its step and wants the learning rate as a tensor, lest each new float be compiled in; all others
    # have floats.
    optimizer.register_step_pre_hook(lambda *_: _set_learning_rates(optimizer, torch.tensor))
    optimizer.register_step_post_hook(lambda *_: _set_learning_rates(optimizer, float))
    _set_learning_rates(optimizer, float)
    return optimizer


def _set_learning_rates(optimizer: torch.optim.Optimizer, form: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = form(float(group["lr"]))


def is_quantised(value: Tensor) -> bool:
    """Whether a state tensor is torchao's, made of codes, scales and a table."""
    return hasattr(value, "__tensor_flatten__")


def parts(value: Any) -> dict[str, Tensor]:
    """The plain tensors that a quantised state tensor is made of, by name, live."""
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def assembled(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A parameter's state with ``<key>.codes``, ``<key>.scale`` and ``<key>.qmap`` put together again as ``<key>``."""
    quantised = {key.removesuffix(".codes") for key in state if key.endswith(".codes")}
    result = {key: value for key, value in state.items() if key.partition(".")[0] not in quantised}
    if quantised:
        from torchao.optim.subclass_8bit import OptimState8bit

        for key in quantised:
            pieces = [state[f"{key}.{part}"] for part in ("codes", "scale", "qmap")]
            result[key] = OptimState8bit(*pieces, signed=key == "exp_avg", dtype=dtype)
    return result

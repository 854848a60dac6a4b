"""The recipe's ``model.mixture``: experts in place of the feed-forward layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genscale.recipe.base import Part


class Mixture(Part):
    """Mixture of experts: each token passes through the few feed-forward layers that a router chooses for it."""

    experts: int = Field(ge=2)
    active: int = Field(default=2, ge=1)
    """Experts that a token passes through."""
    shared: int = Field(default=0, ge=0)
    """Experts that every token passes through besides (DeepSeekMoE)."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of each expert's hidden layer; by default the model's."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How the chosen experts are weighted: softmax over them (Mixtral), or the sigmoid of each divided by their sum
    (DeepSeek-V3). A single active expert is weighted by its own score."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps experts equally busy: a loss, or a bias on the router's choice that needs none (Wang et al. 2024)."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Of the balance loss, which is 1 where experts are equally busy."""
    bias_rate: float = Field(default=0.001, gt=0)
    """How far the bias moves in a step. Scores are about 1/2 with ``sigmoid``, 1 / experts with ``softmax``."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log partition function of the router's logits (ST-MoE)."""
    from_layer: int = Field(default=0, ge=0)
    """The first layer, counting from 0, that has experts; those before stay dense."""

    @model_validator(mode="after")
    def _fits(self) -> Mixture:
        if self.active > self.experts:
            raise ValueError(f"active ({self.active}) cannot be more than experts ({self.experts})")
        return self

"""The recipe's ``objective``: what is learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from genscale.recipe.base import Part
from genscale.recipe.image_objective import AdversarialObjective, DDPMObjective, EDMObjective, FlowObjective


class CausalObjective(Part):
    """Predict each token from those before it."""

    kind: Literal["causal"] = "causal"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition penalty (PaLM, section 5)."""
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The chance that a token of the input is replaced by a random one, in training; what is predicted stays."""


class MaskedObjective(Part):
    """Masked diffusion: tokens are masked at a random rate and predicted both ways; sampling unmasks step by step."""

    kind: Literal["masked"] = "masked"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)
    minimum_rate: float = Field(default=1e-3, gt=0, lt=1)
    """The lowest masking rate; the loss weighs each sample by 1 / rate."""


class InfillObjective(Part):
    """Span corruption or fill-in-the-middle, learned by a causal network over rearranged text."""

    kind: Literal["infill"] = "infill"
    form: Literal["middle", "spans"] = "middle"
    """``middle``: prefix, suffix, then the middle (Bavarian et al. 2022). ``spans``: several spans replaced by
    sentinels and predicted after the text (T5, UL2)."""
    rate: float = Field(default=0.5, gt=0, le=1)
    """``middle``: the share of samples that are rearranged; the rest stay causal. ``spans``: always all."""
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    """``spans``: the share of tokens in corrupted spans."""
    mean_span: float = Field(default=3.0, ge=1)
    """``spans``: their mean length in tokens."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: float = Field(default=0.0, ge=0)


TextObjective = CausalObjective | MaskedObjective | InfillObjective
DiffusionObjective = FlowObjective | EDMObjective | DDPMObjective
Objective = Annotated[TextObjective | DiffusionObjective | AdversarialObjective, Field(discriminator="kind")]

"""From a recipe to its objective."""

from __future__ import annotations

from importlib import import_module

from genscale.data.description import Description
from genscale.objectives.objective import Objective
from genscale.recipe.schema import Recipe

_OBJECTIVES = {
    "causal": "language.CausalLanguage",
    "masked": "language.MaskedLanguage",
    "infill": "language.InfillLanguage",
    "flow": "diffusion.Flow",
    "edm": "diffusion.EDM",
    "ddpm": "diffusion.DDPM",
    "adversarial": "adversarial.Adversarial",
}


def build_objective(recipe: Recipe, described: Description) -> Objective:
    """The objective that ``recipe.objective.kind`` names, its networks initialised from ``recipe.seed``.

    Args:
        described: the data that it learns from, of the recipe's kind.
    """
    module, name = _OBJECTIVES[recipe.objective.kind].split(".")
    return getattr(import_module(f"genscale.objectives.{module}"), name)(recipe, described)

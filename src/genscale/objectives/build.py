"""From a recipe to its objective."""

from __future__ import annotations

from genscale.objectives.language import CausalLanguage, InfillLanguage, MaskedLanguage
from genscale.objectives.objective import Objective
from genscale.recipe.schema import Recipe

_OBJECTIVES: dict[str, type[CausalLanguage | MaskedLanguage | InfillLanguage]] = {
    "causal": CausalLanguage,
    "masked": MaskedLanguage,
    "infill": InfillLanguage,
}


def build_objective(recipe: Recipe, vocabulary: int) -> Objective:
    """The objective that ``recipe.objective.kind`` names, its networks initialised from ``recipe.seed``.

    Args:
        vocabulary: the tokenizer's number of tokens.
    """
    return _OBJECTIVES[recipe.objective.kind](recipe, vocabulary)

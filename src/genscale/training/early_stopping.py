"""Stopping when validation no longer improves."""

from __future__ import annotations

import math
from typing import Any

from genscale.recipe.training import EarlyStopping as EarlyStoppingRecipe


class EarlyStopping:
    """Counts validations without improvement. A value that is not a number is no improvement."""

    def __init__(self, recipe: EarlyStoppingRecipe):
        self.recipe = recipe
        self.best_step: int | None = None
        self.best_value: float | None = None
        self.waited = 0

    def observe(self, step: int, value: float) -> bool:
        """Take in the validation loss after ``step`` steps.

        Returns:
            Whether to stop: ``patience`` validations in a row were not lower than the best by more than
            ``minimum_improvement``. Where this one is the new best, ``best_step`` is ``step``.
        """
        limit = math.inf if self.best_value is None else self.best_value - self.recipe.minimum_improvement
        if value < limit:
            self.best_step, self.best_value, self.waited = step, value, 0
        else:
            self.waited += 1
        return self.waited >= self.recipe.patience

    def state(self) -> dict[str, Any]:
        """For the checkpoint (JSON)."""
        return {"best_step": self.best_step, "best_value": self.best_value, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.best_step, self.best_value, self.waited = state["best_step"], state["best_value"], state["waited"]

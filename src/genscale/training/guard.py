"""The guard against bad steps: it skips them, then goes back, then gives up.

A bad step has a loss or gradient norm that is not finite, or a loss far above its recent mean. It is skipped: no
update. After ``patience`` bad steps in a row the weights are likely to blame, and the run goes back to a checkpoint.

Going back and replaying the same batches would lead to the same weights to the bit, and skipping the bad steps a second
time would change nothing. So, as with PaLM (Chowdhery et al. 2022, section 5.1), the batches that led up to the bad
steps are passed over as well: the ``window`` steps before them the first time, twice as many the second, and so on.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import Any

from genscale.recipe.training import Guard as GuardRecipe

_SPIKE = 6.0
_ENOUGH = 16
"""Losses seen before any can be a spike."""
_RELATIVE_NOISE = 0.02
"""The standard deviation counts as at least this part of the mean: late in training losses may lie so close together
that ordinary noise would be many standard deviations."""


class Verdict(Enum):
    """What to do with a step."""

    GOOD = "good"
    SKIP = "skip"
    ROLLBACK = "rollback"
    GIVE_UP = "give_up"


class Guard:
    """Judges each step by its loss and gradient norm, both already reduced over ranks, so that all ranks agree.

    A pure function of what it observed: a resumed run takes the same decisions. It always comes to an end: bad steps in
    a row lead to going back, which is limited, and then to giving up.

    Args:
        competes: whether the loss is that of a player, which need not fall.
    """

    def __init__(self, recipe: GuardRecipe, competes: bool = False):
        self.recipe = recipe
        self.spike = (None if competes else _SPIKE) if recipe.spike == "auto" else recipe.spike
        self.skipped: set[int] = set()
        """Steps whose batches are passed over, found bad or led up to bad ones before a rollback."""
        self.rollbacks = 0
        self.trusted_until: int | None = None
        """After ROLLBACK, until a state is loaded: go back to the newest checkpoint of at most this many steps."""
        self._losses: deque[float] = deque(maxlen=recipe.window)  # of the last good steps
        self._bad: list[int] = []  # steps, in a row up to now

    def observe(self, step: int, loss: float, gradient_norm: float) -> Verdict:
        """Judge ``step``, counted from 0. Only after GOOD may the weights be updated."""
        if math.isfinite(loss) and math.isfinite(gradient_norm) and not self._is_spike(loss):
            self._losses.append(loss)
            self._bad.clear()
            return Verdict.GOOD
        self._bad.append(step)
        if len(self._bad) < self.recipe.patience:
            return Verdict.SKIP
        if self.rollbacks >= self.recipe.rollbacks:
            return Verdict.GIVE_UP
        self.rollbacks += 1
        self.trusted_until = max(0, self._bad[0] - self.rollbacks * self.recipe.window)
        self.skipped.update(range(self.trusted_until, step + 1))
        self._bad.clear()
        return Verdict.ROLLBACK

    def _is_spike(self, loss: float) -> bool:
        if self.spike is None or len(self._losses) < min(_ENOUGH, self.recipe.window):
            return False
        mean = math.fsum(self._losses) / len(self._losses)
        variance = math.fsum((value - mean) ** 2 for value in self._losses) / (len(self._losses) - 1)
        return loss > mean + self.spike * max(math.sqrt(variance), _RELATIVE_NOISE * abs(mean))

    def memory(self) -> dict[str, Any]:
        """What going back must not undo (JSON): the steps to pass over, and how often the run went back."""
        return {"skipped": sorted(self.skipped), "rollbacks": self.rollbacks}

    def remember(self, memory: dict[str, Any]) -> None:
        """Bring a :meth:`memory` back after an older :meth:`state` was loaded; may be done again without harm."""
        if memory["rollbacks"] > self.rollbacks:
            self.rollbacks = memory["rollbacks"]
            self._bad.clear()
        self.skipped.update(memory["skipped"])

    def state(self) -> dict[str, Any]:
        """All of it, for the checkpoint (JSON)."""
        return {**self.memory(), "losses": list(self._losses), "bad": list(self._bad)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.skipped = set(state["skipped"])
        self.rollbacks = state["rollbacks"]
        self._losses = deque(state["losses"], maxlen=self.recipe.window)
        self._bad = list(state["bad"])
        self.trusted_until = None

"""What a run takes from its data: the streams, and the facts that the rest needs to know about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from genscale.data.description import Description
from genscale.data.prepare import prepare
from genscale.objectives.objective import Objective
from genscale.recipe.schema import Recipe
from genscale.runtime.progress import StageDisplay
from genscale.runtime.world import from_rank_0


class Batches(Protocol):
    """What the loop needs of a stream: a pure function of the step."""

    @property
    def samples_per_epoch(self) -> int: ...

    def batch_at(self, step: int, batch: int, start: int = 0, stop: int | None = None) -> Any: ...

    def sweep(self, batch: int, limit: int | None) -> Iterator[Any]: ...


@dataclass
class Inputs:
    """The prepared data of a run, whatever its kind."""

    described: Description
    fingerprint: str
    stream: Batches
    validation: Batches
    facts: dict[str, Any]
    """What the run records about its data."""
    keep_with: Callable[[Path], None]
    """Copies into the run directory what sampling needs, so that a run samples without its store."""
    preview: Callable[[Objective], list[dict[str, str | bytes]]]
    """The samples that the report shows: texts by name, or a PNG under ``image``."""


def open_inputs(recipe: Recipe, show_progress: bool | None) -> Inputs:
    """Open the recipe's stores, preparing the one that is not there yet.

    Raises:
        UserError: no store and no sources, or a store made otherwise than the recipe says.
    """
    if recipe.data.kind == "images":
        from genscale.training.image_inputs import must_prepare
        from genscale.training.image_inputs import open_images as open_kind
    else:
        from genscale.training.text_inputs import must_prepare
        from genscale.training.text_inputs import open_text as open_kind

    def prepare_where_needed() -> None:
        if must_prepare(recipe):
            with StageDisplay(enabled=show_progress) as display:
                prepare(recipe, on_progress=display)

    from_rank_0(prepare_where_needed)
    return open_kind(recipe)

"""From a recipe to its prepared store, whatever the data is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genscale.data.image_store import ImageStore
    from genscale.data.preparation import Progress
    from genscale.data.store import Store
    from genscale.recipe.schema import Recipe


def prepare(recipe: Recipe, workers: int | None = None, on_progress: Progress | None = None) -> Store | ImageStore:
    """Make the recipe's store, or return the finished one that was made from the same inputs.

    Args:
        recipe: its ``data`` says what goes in, its ``store_directory`` where the store is.
        workers: processes; by default one for each core. The store does not depend on it.
        on_progress: called with (stage, done, total or None, unit) as the work goes on.

    Raises:
        UserError: a source is missing, empty or faulty; the store was made from other inputs; another process is
            preparing it; the disk is full.
    """
    progress = on_progress or (lambda stage, done, total, unit: None)
    if recipe.data.kind == "images":
        from genscale.data.image_prepare import prepare_images

        return prepare_images(recipe, workers, progress)
    from genscale.data.text_prepare import prepare_text

    return prepare_text(recipe, workers, progress)

"""Whether a layout fits the processes and the model, told before any process waits for another."""

from __future__ import annotations

from genscale.recipe.image_model import DiffusionTransformerModel
from genscale.recipe.layout import Axis
from genscale.recipe.model import TransformerModel
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Adafactor, AdamW, Muon
from genscale.runtime.errors import UserError


def fitted_sizes(recipe: Recipe, processes: int) -> dict[Axis, int]:
    """Ranks along each axis of the recipe's layout.

    Raises:
        UserError: the processes do not fill the layout, or the model cannot be laid out so.
    """
    layout = recipe.layout
    try:
        apart = recipe.training.low_communication
        sizes = layout.sizes(processes, apart.groups if apart else 1)
    except ValueError as error:
        raise UserError(f"{error}; start as many with torchrun --nproc-per-node, or change the layout") from None
    model = recipe.model
    if not isinstance(model, TransformerModel | DiffusionTransformerModel):
        for axis in ("tensor", "pipeline", "context", "expert"):
            if sizes[axis] > 1:
                raise UserError(
                    f"layout.{axis}: model.kind '{model.kind}' is no stack of transformer blocks, which it needs; "
                    "layout.shard and layout.replicate work with every model"
                )
    else:
        _check_heads(model, sizes)
        _check_stages(recipe, model, sizes)
        _check_tokens(recipe, sizes)
        mixture = getattr(model, "mixture", None)
        if sizes["expert"] > 1:
            if mixture is None:
                raise UserError("layout.expert: the model has no experts; give it some with model.mixture")
            if mixture.experts % sizes["expert"]:
                raise UserError(
                    f"layout.expert: {sizes['expert']} does not divide model.mixture.experts ({mixture.experts})"
                )
    _check_training(recipe, sizes)
    return sizes


def _check_heads(model: TransformerModel | DiffusionTransformerModel, sizes: dict[Axis, int]) -> None:
    tensor = sizes["tensor"]
    heads = {"model.heads": model.heads, "model.key_value_heads": getattr(model, "key_value_heads", None)}
    for key, count in {**heads, "the hidden width": model.width_of_hidden}.items():
        if count is not None and count % tensor:
            raise UserError(f"layout.tensor: {tensor} does not divide {key} ({count})")


def _check_stages(recipe: Recipe, model: TransformerModel | DiffusionTransformerModel, sizes: dict[Axis, int]) -> None:
    if sizes["pipeline"] == 1:
        return
    stages = sizes["pipeline"] * recipe.layout.stages_per_rank
    if stages > model.layers:
        raise UserError(f"layout.pipeline: {stages} stages are more than model.layers ({model.layers})")
    if getattr(recipe.objective, "learned_uncertainty", False):
        raise UserError(
            "layout.pipeline: objective.learned_uncertainty is not in a pipeline's stages; use shard or tensor"
        )


def _check_tokens(recipe: Recipe, sizes: dict[Axis, int]) -> None:
    """Of texts; how many tokens an image has is known with the data (:func:`check_sequence`)."""
    if isinstance(recipe.model, TransformerModel):
        check_sequence(recipe, sizes, recipe.model.context, "model.context")
        if sizes["context"] > 1 and recipe.layout.attention == "ring" and recipe.model.dropout:
            raise UserError(
                "layout.attention: 'ring' keeps no probabilities to drop; use all_gather, or model.dropout=0"
            )


def check_sequence(recipe: Recipe, sizes: dict[Axis, int], tokens: int, key: str) -> None:
    """Raise UserError where a sequence of so many tokens, named by ``key``, cannot be split."""
    tensor = sizes["tensor"] if recipe.layout.sequence else 1
    parts = tensor * (2 * sizes["context"] if sizes["context"] > 1 else 1)
    if tokens % parts == 0:
        return
    split = [f"twice layout.context ({sizes['context']})"] if sizes["context"] > 1 else []
    split += [f"layout.tensor ({tensor})"] if tensor > 1 else []
    hint = "; or layout.sequence=false" if sizes["context"] == 1 else ""
    raise UserError(f"{key} ({tokens} tokens) must be a multiple of {' x '.join(split)}{hint}")


def _check_training(recipe: Recipe, sizes: dict[Axis, int]) -> None:
    optimizer = recipe.training.optimizer
    if recipe.layout.precision == "fp8" and sizes["tensor"] > 1:
        raise UserError("layout.tensor: layers in fp8 are not split by tensor; use shard, or precision: bf16")
    split = [axis for axis in ("shard", "tensor", "expert") if sizes[axis] > 1]
    if split and isinstance(optimizer, Adafactor):
        raise UserError(f"layout.{split[0]}: adafactor's factors are of whole matrices; use adamw or muon")
    eight_bit = isinstance(optimizer, AdamW) and optimizer.bits == 8
    eight_bit |= isinstance(optimizer, Muon) and optimizer.rest.bits == 8
    if split and eight_bit:
        raise UserError(f"layout.{split[0]}: an optimizer of 8 bits keeps blocks of whole parameters; use bits: 32")
    data = sizes["group"] * sizes["replicate"] * sizes["shard"] * sizes["expert"]
    samples = recipe.samples_per_step
    if samples < data:
        raise UserError(f"training.batch: {samples} samples are fewer than the {data} ranks that share them")

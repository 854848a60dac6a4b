"""How many samples go through the network at once."""

from __future__ import annotations

from typing import Literal

import torch

from genscale.objectives.objective import Objective
from genscale.recipe.model import TransformerModel
from genscale.runtime.device import memory_free
from genscale.runtime.errors import UserError
from genscale.runtime.world import World
from genscale.training.inputs import Inputs

# Taken, not measured: beyond this many tokens at once matrix products are large enough to gain nothing more.
_ENOUGH_TOKENS = {"cpu": 16_384}
_ENOUGH_TOKENS_ACCELERATOR = 65_536


def bytes_per_sample(shape: TransformerModel, vocabulary: int, precision: str) -> int:
    """Activations kept for the backward of one sample, in bytes.

    Per token and layer about 10 tensors of the width, 3 of the hidden width and the attention's queries, keys and
    values (Korthikanti et al. 2022, section 4.1, with a fused attention kernel), and three copies of the logits.
    """
    element = 4 if precision == "fp32" else 2
    layer = 10 * shape.width + 3 * shape.width_of_hidden + 4 * shape.heads * shape.width_of_head
    return shape.context * (element * layer * shape.layers + 12 * vocabulary)


def choose_micro_batch(
    requested: int | Literal["auto"],
    batch: int,
    objective: Objective,
    inputs: Inputs,
    shape: TransformerModel,
    precision: str,
    device: torch.device,
    world: World,
) -> int:
    """Samples in one forward: as asked, or the most that is useful and fits in half of the free memory."""
    share = batch // world.size
    if share < 1:
        raise UserError(f"training.batch: {batch} samples are fewer than the {world.size} ranks")
    if requested != "auto":
        if requested > share:
            raise UserError(
                f"layout.micro_batch: {requested} samples are more than each rank's share of the batch, {share}"
            )
        return requested
    states = sum(16 * parameter.numel() for parameter in objective.parameters())  # weight, gradient, two moments
    free = (memory_free(device) - states) // 2
    fits = free // bytes_per_sample(shape, inputs.vocabulary, precision)
    enough = _ENOUGH_TOKENS.get(device.type, _ENOUGH_TOKENS_ACCELERATOR) // shape.context
    wanted = max(1, min(share, fits, enough))
    passes = -(-share // wanted)
    return -(-share // passes)  # equal passes

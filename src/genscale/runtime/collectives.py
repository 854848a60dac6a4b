"""The collectives whose names differ between the versions of torch that are served."""

from __future__ import annotations

from torch import Tensor, distributed
from torch.distributed import ProcessGroup

# torch 2.13 warns of the old names; older versions know only those.
_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def gather_into(out: Tensor, part: Tensor, group: ProcessGroup | None) -> None:
    """Every rank's part, one after the other along the first dimension, in their order."""
    _gather(out, part, group=group)


def scatter_sum_into(out: Tensor, parts: Tensor, group: ProcessGroup | None) -> None:
    """This rank's part along the first dimension of the sum over ranks."""
    _scatter(out, parts, group=group)

"""How a stack of blocks lies on the ranks of ``context``: each has some tokens of every sequence."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from genscale.models.attention import Attention
from genscale.models.blocks import Around, Blocks
from genscale.models.mask import AttentionMask
from genscale.parallel.context import Portions, context_attend
from genscale.parallel.mesh import Mesh

portions_of = cache(Portions)  # one for each length, with the plans that it has made for masks in use


def split_context(blocks: Blocks, mesh: Mesh, method: str, first: bool, last: bool) -> None:
    """Split the tokens before the first block, join them after the last, and let attention reach over the ranks.

    Args:
        first: whether the first block of the network is among these, ``last``: the last, and its tokens are joined.
    """
    group = mesh.group("context")
    assert group is not None
    rank, ranks = mesh.rank("context"), mesh.size("context")

    def portions(around: Around) -> Portions:
        return portions_of(around.masks[0].keys, ranks, rank)

    def enter(_: nn.Module, told: tuple[Tensor, Tensor | None, Around]) -> tuple[Tensor, Tensor | None, Around]:
        x, condition, around = told
        own = portions(around)
        if first:
            x = own.split(x, group)
        if around.rotation is not None:
            cosines, sines = (own.take(each, dim=2) for each in around.rotation)
            around = Around(around.masks, (cosines, sines), around.cache)
        return x, condition, around

    blocks.register_forward_pre_hook(enter)
    if last:
        blocks.register_forward_hook(lambda _, told, x: portions(told[2]).join(x, group))
    for layer in blocks.modules():
        if isinstance(layer, Attention):
            layer.kernel = partial(_attend, group=group, rank=rank, ranks=ranks, method=method)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: AttentionMask,
    *options: Any,
    group: ProcessGroup,
    rank: int,
    ranks: int,
    method: Any,
) -> Tensor:
    portions = portions_of(mask.keys, ranks, rank)
    return context_attend(queries, keys, values, mask, *options, portions=portions, group=group, method=method)

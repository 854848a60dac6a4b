"""Tensor and sequence parallelism: one rule for each type of layer.

Each rank has a part of every large weight: heads of attention, the hidden width of a feed-forward layer, rows of the
vocabulary (Shoeybi et al. 2019). Between those layers, tokens are split as well (Korthikanti et al. 2022), unless
``layout.sequence`` is off. Weights are DTensors over the mesh's ``tensor`` axis; what is computed with is their own
part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn import functional as F

from genscale.models.blocks import Around, Blocks
from genscale.models.embedding import Embedding, Head
from genscale.models.layers import Attention, FeedForward, Norm
from genscale.models.mixture import MixtureFeedForward, mixture_layers
from genscale.parallel.exchange import copied, gathered, scattered, summed
from genscale.parallel.shards import part_of, replace_parameter


class Region:
    """What lies between two exchanges: each rank has its part of every layer there.

    Args:
        mesh: the ranks, one dimension.
        sequence: whether each rank has a part of the tokens between the layers.
    """

    def __init__(self, mesh: DeviceMesh, sequence: bool):
        self.mesh, self.sequence = mesh, sequence
        self.group: ProcessGroup = mesh.get_group()

    def into(self, x: Tensor) -> Tensor:
        """Before a layer whose weights are split: (batch, tokens, width) with all tokens."""
        return gathered(x, self.group) if self.sequence else copied(x, self.group)

    def out_of(self, x: Tensor) -> Tensor:
        """After one: the sum of the ranks' parts, of this rank's tokens."""
        return scattered(x, self.group) if self.sequence else summed(x, self.group)


def split_weight(module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Make a parameter a DTensor of which this rank has its part; one without data stays without."""
    weight = module._parameters[name]
    assert weight is not None
    full = weight.detach()
    empty = DTensor.from_local(
        torch.empty(0, device="meta"), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    part = part_of(full, empty).contiguous()
    split = DTensor.from_local(part, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
    replace_parameter(module, name, split)


def part(weight: Tensor) -> Tensor:
    """This rank's part of a weight, through which gradients flow."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class ColumnLinear(nn.Linear):
    """A linear layer of which each rank has some outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, part(self.weight), None if self.bias is None else part(self.bias))


class RowLinear(nn.Linear):
    """A linear layer of which each rank has some inputs: the ranks' results are added up by ``out_of``."""

    out_of: Callable[[Tensor], Tensor]
    adds_bias = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.out_of(F.linear(x, part(self.weight)))
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype) * self.adds_bias


def column(linear: nn.Linear, region: Region) -> None:
    """Split a linear layer by its outputs."""
    linear.__class__ = ColumnLinear
    for name in ("weight", "bias") if linear.bias is not None else ("weight",):
        split_weight(linear, name, region.mesh, [Shard(0)])


def row(linear: nn.Linear, region: Region) -> None:
    """Split a linear layer by its inputs."""
    linear.__class__ = RowLinear
    linear.out_of = region.out_of  # type: ignore[assignment]
    split_weight(linear, "weight", region.mesh, [Shard(1)])


def split_attention(layer: Attention, region: Region) -> None:
    """Each rank has some heads."""
    for linear in (layer.query, layer.key, layer.value):
        column(linear, region)
    row(layer.output, region)
    layer.register_forward_pre_hook(lambda _, told: (region.into(told[0]), *told[1:]))


def split_feed_forward(layer: FeedForward, region: Region) -> None:
    """Each rank has a part of the hidden width."""
    for linear in (layer.gate, layer.up):
        if linear is not None:
            column(linear, region)
    row(layer.down, region)
    layer.register_forward_pre_hook(lambda _, told: (region.into(told[0]), *told[1:]))


class VocabularyEmbedding(Embedding):
    """An embedding of which each rank has some rows: it looks up those, and the ranks add up."""

    group: ProcessGroup
    first_row: int

    def forward(self, indices: Tensor) -> Tensor:
        weight = part(self.weight)  # (rows here, width)
        here = indices - self.first_row
        mine = (here >= 0) & (here < len(weight))
        if len(weight):
            x = F.embedding(here.clamp(0, len(weight) - 1), weight) * mine.unsqueeze(-1)
        else:
            x = weight.sum() + weight.new_zeros(*indices.shape, weight.shape[1])
        x = summed(x, self.group)
        return x if self.scale == 1.0 else x * self.scale


class VocabularyHead(Head):
    """A head of which each rank has the logits of some rows of the vocabulary."""

    def forward(self, hidden: Tensor, read: Callable[..., Any] | None = None) -> Any:
        weight, hidden = part(self.rows), copied(hidden, self.group)
        if read is not None:
            return read(hidden, weight, self)
        logits = F.linear(hidden, weight)
        assert self.group is not None
        ranks = self.group.size()
        each = -(-self.vocabulary // ranks)
        logits = gathered(F.pad(logits, (0, each - logits.shape[-1])), self.group, dim=logits.ndim - 1)
        return self.capped(logits[..., : self.vocabulary])


def split_vocabulary(embedding: Embedding | None, head: Head | None, region: Region) -> None:
    """Each rank has some rows of the embedding and of the head, which may be the same; either may be elsewhere."""
    rank = region.mesh.get_local_rank()

    def first_row(entries: int) -> int:
        return min(entries, rank * -(-entries // region.mesh.size()))

    if embedding is not None:
        embedding.__class__ = VocabularyEmbedding
        embedding.group, embedding.first_row = region.group, first_row(len(embedding.weight))  # type: ignore
        split_weight(embedding, "weight", region.mesh, [Shard(0)])
    if head is not None:
        head.__class__ = VocabularyHead
        head.group, head.first_row = region.group, first_row(head.vocabulary)
        if not head.tied:
            split_weight(head, "weight", region.mesh, [Shard(0)])


def split_tokens(blocks: Blocks, region: Region, first: bool, last: bool) -> None:
    """Each rank has a part of the tokens from the first block to the last, which may be on other processes."""

    def enter(_: nn.Module, told: tuple[Tensor, Tensor | None, Around]) -> tuple[Tensor, Tensor | None, Around]:
        x, condition, around = told
        if first:
            x = scattered(x, region.group, partial=False)
            condition = None if condition is None else copied(condition, region.group)
        return x, condition, around

    blocks.register_forward_pre_hook(enter)
    if last:
        blocks.register_forward_hook(lambda _, told, x: gathered(x, region.group, partial=False))


def split_blocks(blocks: Blocks, region: Region) -> set[str]:
    """Apply the rules to all layers of the blocks.

    Returns:
        Names of the parameters that every rank has whole and of whose gradient each has a part: what acts on a rank's
        own heads, or on its own tokens.
    """
    of_mixtures = {part for layer in mixture_layers(blocks) for part in layer.modules()}
    partial = set()
    for path, layer in blocks.named_modules():
        if isinstance(layer, Attention):
            split_attention(layer, region)
        elif isinstance(layer, FeedForward) and layer not in of_mixtures:
            split_feed_forward(layer, region)
        elif isinstance(layer, MixtureFeedForward):
            partial.add(f"{path}.router.weight")  # each rank has a part of what its choices come to
        elif path.endswith((".query_norm", ".key_norm")) and isinstance(layer, Norm):
            partial |= {f"{path}.{name}" for name, _ in layer.named_parameters()}
    if region.sequence:
        partial |= {name for name, parameter in blocks.named_parameters() if not isinstance(parameter, DTensor)}
    return partial

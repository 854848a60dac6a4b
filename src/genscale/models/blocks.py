"""The stack of equal blocks that transformers are made of, and what each block is told beside the sequence.

A network with such a stack (:class:`Stacked`) says in three parts what it does: what enters the stack, what surrounds
it, what leaves it. Pipelines run the parts on different processes; sequences are split and joined at the stack's ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from genscale.models.cache import KeyValueCache
from genscale.models.mask import AttentionMask
from genscale.models.rotary import Rotation

Recompute = Literal["none", "selective", "full"]


@dataclass
class Around:
    """What blocks are told beside the sequence, for the whole of it; made of a network's inputs, not of weights."""

    masks: Sequence[AttentionMask]
    """One for each layer of the network; layers with the same reach share theirs."""
    rotation: Rotation | None
    cache: KeyValueCache | None = None


class Blocks(nn.ModuleList):
    """Runs the sequence through its blocks, each called as ``block(x, mask, rotation, ...)``.

    Blocks are numbered by their names, which stay what they are where a process has only some of them.

    Attributes:
        recompute: what is recomputed in the backward instead of kept: ``full``: each block; ``selective``: of each
            block all but its matrix products and attention, which cost the most to repeat.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__(blocks)
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor, condition: Tensor | None, around: Around) -> Tensor:
        """(batch, tokens, width) to the same; ``condition`` is (batch, width) for blocks that are told one."""
        recompute = self.recompute if self.training and around.cache is None and is_grad_enabled() else "none"
        for name, block in self._modules.items():
            layer = int(name)
            told: tuple[Any, ...] = (around.masks[layer], around.rotation)
            if condition is not None:
                told += (condition,)
            if around.cache is not None:
                told += (around.cache, layer)
            assert block is not None
            x = run_block(block, recompute, x, *told)
        return x


def run_block(block: nn.Module, recompute: Recompute, *arguments: Any) -> Any:
    """Call the block; what is recomputed is not kept for the backward."""
    if recompute == "none":
        return block(*arguments)
    if recompute == "full":
        return checkpoint(block, *arguments, use_reentrant=False)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=_keeping_products)


def set_recompute(network: nn.Module, recompute: Recompute) -> None:
    """Of every stack of blocks in the network; those of captions' small encoders are included."""
    for module in network.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute  # type: ignore[assignment]


@runtime_checkable
class Stacked(Protocol):
    """A network whose forward is ``leave(blocks(enter(...), around(...)))``."""

    blocks: Blocks
    first: tuple[str, ...]
    """Names of the children that :meth:`enter` uses."""
    last: tuple[str, ...]
    """Names of the children that :meth:`leave` uses; a weight that both use belongs to both."""
    conditioned: bool
    """Whether blocks are told a condition."""

    def enter(self, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """The sequence, (batch, tokens, width), and the condition, (batch, width), where there is one."""
        ...

    def around(self, dtype: torch.dtype, **inputs: Any) -> Around:
        """What the blocks are told besides; needs no weights. ``dtype`` is the sequence's."""
        ...

    def leave(self, x: Tensor, condition: Tensor | None, **inputs: Any) -> Any:
        """What the network answers."""
        ...


# Matrix products and attention kernels, whose results are kept; all else in a block is cheap beside them.
_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    communicates = operator.namespace in ("c10d", "_c10d_functional")
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT or communicates else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = partial(create_selective_checkpoint_contexts, _policy)

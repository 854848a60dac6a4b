"""The recipe's ``layout``: how the work lies on the devices. What is learned does not depend on it."""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field, model_validator

from genscale.recipe.base import Part

Axis = Literal["group", "pipeline", "replicate", "shard", "expert", "context", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""From the outermost, whose ranks may be far apart, to the innermost, whose ranks talk most. The first is that of the
groups of ``training.low_communication``, which train apart."""


class Layout(Part):
    """How the work lies on the devices.

    ``pipeline x replicate x shard x expert x context x tensor`` is the number of processes.
    """

    device: str = "auto"
    """``auto``: the accelerator if there is one, else the CPU."""
    micro_batch: int | Literal["auto"] = "auto"
    """Samples in one forward and backward pass."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """``auto``: what the device multiplies fastest, by a short measurement. ``fp8``: the blocks' matrix products in 8
    bits through torchao (extra ``genscale[torchao]``), the rest in bf16."""
    compile: bool | Literal["auto"] = "auto"
    """``auto``: torch.compile where a short measurement shows that it pays within the budget."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping it: all of each block, or all but its matrix products."""

    replicate: int | Literal["auto"] = "auto"
    """Copies of the model that share the batch; ``auto``: as many as the other axes leave."""
    shard: int = Field(default=1, ge=1)
    """Ranks that share the batch and one copy of weights, gradients and optimizer state (FSDP)."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that share each matrix product: heads, hidden widths, the vocabulary."""
    sequence: bool = True
    """With ``tensor``: split the tokens as well, between the matrix products."""
    pipeline: int = Field(default=1, ge=1)
    """Ranks that have the blocks one after the other."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """The order in which a pipeline works off its micro-batches."""
    stages: int = Field(default=2, ge=2)
    """Stages on each rank of a pipeline, for the schedules that have several: ``interleaved`` and ``zero_bubble``."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each sequence."""
    attention: Literal["ring", "all_gather"] = "ring"
    """With ``context``: whether keys and values go round, or are all gathered at once."""
    expert: int = Field(default=1, ge=1)
    """Ranks that share the batch and the experts of a mixture."""
    offload: bool = False
    """With ``shard``: keep weights and optimizer state in the CPU's memory, and update there."""
    compression: Literal["none", "bf16", "powersgd"] = "none"
    """Of the gradients that copies of the model exchange. Anything but ``none`` changes the results a little."""
    compression_rank: int = Field(default=4, ge=1)
    """Of ``powersgd``: columns of the factors that stand for a matrix."""

    @model_validator(mode="after")
    def _fits(self) -> Layout:
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}")
        if self.replicate != "auto" and self.replicate < 1:
            raise ValueError(f"replicate must be at least 1, not {self.replicate}")
        if self.offload and self.shard == 1:
            raise ValueError("offload keeps shards in the CPU's memory; it needs shard of 2 or more")
        if self.pipeline > 1 and self.schedule == "zero_bubble" and self.recompute != "none":
            raise ValueError("schedule 'zero_bubble' goes back through a block twice; it needs recompute: none")
        if self.compression != "none" and self.shard > 1:
            raise ValueError(f"compression '{self.compression}' is for whole gradients; it needs shard: 1")
        if self.compression == "powersgd" and self.precision == "fp16":
            raise ValueError(
                "compression 'powersgd' keeps errors, which fp16's changing loss scale would spoil; use bf16"
            )
        return self

    @property
    def sharded(self) -> bool:
        """Whether a process may have less than the whole model."""
        return math.prod((self.shard, self.tensor, self.pipeline, self.expert)) > 1

    @property
    def stages_per_rank(self) -> int:
        """Of a pipeline."""
        return self.stages if self.schedule in ("interleaved", "zero_bubble") else 1

    def sizes(self, processes: int, groups: int = 1) -> dict[Axis, int]:
        """Ranks along each axis, from the outermost.

        Args:
            groups: that train apart, each laid out so.

        Raises:
            ValueError: the axes do not multiply to the number of processes.
        """
        sizes: dict[Axis, int] = {axis: groups if axis == "group" else getattr(self, axis) for axis in AXES}
        others = math.prod(sizes[axis] for axis in AXES if axis != "replicate")
        if self.replicate == "auto":
            sizes["replicate"] = max(1, processes // others)
        product = math.prod(sizes.values())
        if product != processes:
            shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "replicate 1"
            raise ValueError(
                f"layout: {shown} needs {product} processes, but there {'is' if processes == 1 else 'are'} {processes}"
            )
        return sizes

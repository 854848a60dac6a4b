"""One function that lays an objective's networks on the ranks. It reads in the order in which things are done:

pipeline, tensor, expert, context, first values, fully sharded, sums of gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from genscale.models.blocks import Blocks, Stacked
from genscale.models.initialise import Beginning, first_values
from genscale.models.transformer import Transformer
from genscale.objectives.objective import Denoising, Objective
from genscale.parallel import fsdp
from genscale.parallel.context_rule import split_context
from genscale.parallel.gradients import Compressor, GradientSum
from genscale.parallel.mesh import SUMMED, Mesh
from genscale.parallel.mixture import split_mixtures
from genscale.parallel.pipeline import Pipeline, Stage, prune, split_evenly
from genscale.parallel.shards import fill, holders, replace_parameter
from genscale.parallel.tensor import Region, split_blocks, split_tokens, split_vocabulary
from genscale.recipe.layout import Axis, Layout


@dataclass
class Placed:
    """How one network lies on the ranks."""

    network: nn.Module
    """What this rank has of it, under the names of the whole."""
    gradients: GradientSum
    copies: dict[str, int]
    """Ranks of the world that have the same part of each parameter as this one."""
    split: bool = False
    """Whether any rank has less than the whole network."""
    elsewhere: frozenset[str] = frozenset()
    """Parameters that an earlier stage of the pipeline has as well, and writes to checkpoints."""
    roots: list[nn.Module] = field(default_factory=list)
    """Modules whose weights are whole only while they run."""
    keep: bool = False
    """Whether weights stay whole until the backward is over."""
    pipeline: Pipeline | None = None
    norm: float = 0.0
    """Of the last gradient of this rank's group."""
    loads: Tensor | None = None
    """(layers, experts): of the last step, over all ranks, where there are experts."""


@contextmanager
def without_data() -> Iterator[None]:
    """Within, modules are built with parameters that have a shape and no data."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register_shape  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def parallelize(
    objective: Objective,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype | None = None,
    compressor: Callable[[], Compressor] | None = None,
    real: bool = True,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Placed]:
    """Lay each of the objective's networks on the ranks; the objective computes with what this rank has.

    Args:
        dtype: of the whole copies of sharded weights; None: the weights' own.
        compressor: makes what sums gradients, for each network.
        real: give the weights data; without, only their shapes are laid out, as for a simulation.
        context: that a pipeline's stages run in, such as autocast.
    """
    twice = {phase.trains for phase in objective.phases if phase.differentiates_twice}
    placed = {}
    for name, network in objective.networks.items():
        placed[name] = _place(
            objective, network, layout, mesh, device, dtype, compressor, real, context, keep=name in twice
        )
    return placed


def _place(
    objective: Objective,
    network: nn.Module,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype | None,
    compressor: Callable[[], Compressor] | None,
    real: bool,
    context: Callable[[], AbstractContextManager[object]],
    keep: bool,
) -> Placed:
    stages: dict[int, Stage] = {}
    pipeline = None
    if mesh.size("pipeline") > 1:
        assert isinstance(objective, Denoising)
        stages, pipeline = _split_stages(objective, network, layout, mesh, device, context)
        keep = True  # gathered once for all micro-batches; and what takes weights' gradients later needs them whole
    runs = [(stage.network, stage.first, stage.last) for stage in stages.values()] or [(network, True, True)]
    tied = isinstance(network, Transformer) and network.shape.tied_head

    inner: Any = getattr(network, "network", network)  # past a learned uncertainty
    views: list[tuple[Any, bool, bool]] = [(getattr(run, "network", run), first, last) for run, first, last in runs]
    partial: set[str] = set()
    region = Region(mesh.along("tensor"), layout.sequence) if mesh.size("tensor") > 1 else None
    if mesh.size("context") > 1:
        for view, first, last in views:
            joins = not (isinstance(objective, Denoising) and objective.takes_parts)
            split_context(view.blocks, mesh, layout.attention, first=first, last=last and joins)
        if isinstance(objective, Denoising):
            objective.split_over(mesh.rank("context"), mesh.size("context"))
    if mesh.size("tensor", "expert", "context") > 1:
        split_mixtures(inner.blocks, mesh, region)
    if region is not None:
        path = "network.blocks." if inner is not network else "blocks."
        partial = {path + name for name in split_blocks(inner.blocks, region)}
        if isinstance(inner, Transformer):
            split_vocabulary(inner.embedding, inner.head, region)
        if layout.sequence:
            for view, first, last in views:
                split_tokens(view.blocks, region, first, last)
            for stage in stages.values():
                stage.tokens = region.group

    sharded = mesh.size("shard") > 1
    roots: list[nn.Module] = list(stages.values()) if stages else [network]
    experts = {module for module in network.modules() if getattr(module, "split_over_experts", False)}
    if sharded:
        for unit in list(fsdp.units(network)):
            if real:
                give_data(network, unit, device)
            fsdp.shard_unit(unit, mesh, layout, dtype, keep, experts & set(unit.modules()))
    if real:
        give_data(network, network, device)
    if sharded:
        for root in roots:
            # What is left outside the blocks stays whole: the head is used after the forward is over.
            fsdp.shard_unit(root, mesh, layout, dtype, True, ())

    twice_there = frozenset[str]()
    tie: ProcessGroup | None = None
    if pipeline is not None and tied:
        tie = _ends(mesh)
        if any(stage.last for stage in stages.values()) and not any(stage.first for stage in stages.values()):
            twice_there = frozenset({"embedding.weight"})
    groups: dict[nn.Parameter, tuple[ProcessGroup, ...]] = {}
    copies = {}
    of_experts = {id(parameter) for module in experts for parameter in module.parameters()}
    for name, parameter in network.named_parameters():
        axes: tuple[Axis, ...] = () if sharded else SUMMED
        if id(parameter) in of_experts and not sharded:
            axes = tuple(axis for axis in SUMMED if axis != "expert")
        if name in partial:
            axes += ("tensor",)
        wanted = [mesh.group(*axes)] if axes else []
        copies[name] = holders(parameter, mesh.size("replicate", "shard", "expert", "context", "tensor"))
        if tie is not None and name == "embedding.weight":
            wanted.append(tie)
            copies[name] *= 2
        groups[parameter] = tuple(group for group in wanted if group is not None)
    gradients = GradientSum(groups, compressor() if compressor else None)
    split = mesh.size("shard", "tensor", "pipeline", "expert") > 1
    return Placed(network, gradients, copies, split, twice_there, roots if sharded else [], keep, pipeline)


def _split_stages(
    objective: Denoising,
    network: nn.Module,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[dict[int, Stage], Pipeline]:
    """Prune the network to the blocks of this rank's stages, and make a stage of each range of them."""
    rank, ranks = mesh.rank("pipeline"), mesh.size("pipeline")
    count = ranks * layout.stages_per_rank
    stacked = cast(Stacked, network)
    before, costs, after = costs_of(network)
    ranges = split_evenly(costs, before, after, count)
    mine = [number for number in range(count) if number % ranks == rank]
    views = {}
    for number in mine:
        view = copy.copy(network)  # the same modules, in a tree of its own
        view._modules = dict(network._modules)
        view._modules["blocks"] = _some(stacked.blocks, ranges[number])
        prune(view, ranges[number], first=number == 0, last=number == count - 1)
        views[number] = view
    own = [block for number in mine for block in ranges[number]]
    for name in list(stacked.blocks._modules):
        if int(name) not in own:
            del stacked.blocks._modules[name]
    kept = {name for view in views.values() for name, module in view._modules.items() if module is not None}
    for name in list(network._modules):
        if name not in kept and network._modules[name] is not None:
            setattr(network, name, None)
    stages = {
        number: Stage(cast(Stacked, view), number, count, objective.scored, context) for number, view in views.items()
    }
    pipeline = Pipeline(stages, count, layout.schedule, mesh, layout.sequence, device)
    objective.goes_back_again = layout.schedule == "zero_bubble"
    objective.score = pipeline.score  # type: ignore[method-assign]
    return stages, pipeline


def _some(blocks: Blocks, numbers: range) -> Blocks:
    """The same blocks, some of them, under their names."""
    some = copy.copy(blocks)
    some._modules = {name: block for name, block in blocks._modules.items() if int(name) in numbers}
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        setattr(some, hooks, copy.copy(getattr(blocks, hooks)))
    return some


def costs_of(network: nn.Module) -> tuple[float, list[float], float]:
    """Multiplications for a token: before the blocks, in each of them, after them."""
    stacked = cast(Stacked, network)

    def matrices(module: nn.Module | None) -> float:
        if module is None:
            return 0.0
        share = {id(p): getattr(m, "share_active", 1.0) for m in module.modules() for p in m.parameters()}
        return float(sum(p.numel() * share[id(p)] for p in module.parameters() if p.ndim > 1))

    def ends(names: tuple[str, ...]) -> float:
        # A table is looked up, not multiplied with; a head that is tied multiplies with one.
        modules = [getattr(network, name) for name in names]
        multiplied = sum(matrices(each) for each in modules if not name_of(each).endswith("Embedding"))
        head = getattr(network, "head", None)
        return multiplied + (head.rows.numel() if head is not None and head in modules and head.tied else 0)

    return ends(stacked.first), [matrices(block) for block in stacked.blocks], ends(stacked.last)


def name_of(module: nn.Module | None) -> str:
    return type(module).__name__


def _ends(mesh: Mesh) -> ProcessGroup | None:
    """The first and the last rank of this rank's pipeline; None on those between."""
    if mesh.size("pipeline") == 2:
        return mesh.group("pipeline")
    mine = None
    for line in mesh.lines("pipeline"):  # all ranks make all groups, in one order
        group = distributed.new_group([line[0], line[-1]])
        if distributed.get_rank() in (line[0], line[-1]):
            mine = group
    return mine


@torch.no_grad()
def give_data(network: nn.Module, unit: nn.Module, device: torch.device) -> None:
    """Give those parameters inside ``unit`` their first values that have none; each is drawn whole, one at a time."""
    inside = {id(module) for module in unit.modules()}
    empty: set[int] = set()
    for module in network.modules():
        if id(module) not in inside:
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            replace_parameter(module, name, _with_memory(parameter, device))
            empty.add(id(module._parameters[name]))
    if not empty:
        return
    for root in network.modules():
        if isinstance(getattr(root, "beginning", None), Beginning):
            names = {name for name, parameter in root.named_parameters() if id(parameter) in empty}
            first_values(root, names.__contains__, fill)


def _with_memory(parameter: Tensor, device: torch.device) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, device=device)
    part = torch.empty_like(parameter._local_tensor, device=device)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

"""From a recipe to a trained run directory: the verb ``train``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from genscale.data.description import Description, ImageDescription
from genscale.models.blocks import set_recompute
from genscale.objectives.build import build_objective
from genscale.objectives.objective import Objective
from genscale.parallel.compression import HalfSum, PowerSGD
from genscale.parallel.fit import check_sequence, fitted_sizes
from genscale.parallel.gradients import Compressor, PlainSum
from genscale.parallel.mesh import Mesh
from genscale.parallel.parallelize import parallelize, without_data
from genscale.recipe.dialect import read_yaml
from genscale.recipe.image_model import DiffusionTransformerModel
from genscale.recipe.layout import Axis, Layout
from genscale.recipe.load import differences, recipe_from_mapping, recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Trackers
from genscale.runs.disk import writing
from genscale.runs.run import Run
from genscale.runtime.agreement import agree, software
from genscale.runtime.allocator import keep_freed_memory
from genscale.runtime.device import device_summary, memory_used, pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.memory import explained_memory
from genscale.runtime.peak import matmul_peak
from genscale.runtime.progress import TrainingDisplay
from genscale.runtime.rendezvous import meet
from genscale.runtime.stragglers import StragglerWatch
from genscale.runtime.watch import Watch, watching
from genscale.runtime.world import World, current_world, from_rank_0, join_world
from genscale.training.checkpoint import CheckpointStore, export_weights
from genscale.training.compilation import decide_compile
from genscale.training.early_stopping import EarlyStopping
from genscale.training.guard import Guard
from genscale.training.inputs import Inputs, open_inputs
from genscale.training.interruption import watched_signals
from genscale.training.job import Job
from genscale.training.loop import forget, restore, run_steps
from genscale.training.low_precision import use_fp8
from genscale.training.micro_batch import choose_micro_batch
from genscale.training.plan import Plan, make_plan
from genscale.training.precision import autocast, pick_precision, torch_dtype
from genscale.training.preview import WholeCopy
from genscale.training.profile import StepProfile
from genscale.training.restore import load_objective
from genscale.training.state import TrainingState
from genscale.training.step import accumulate, clear
from genscale.training.trackers import open_trackers


def train(recipe: Recipe, *, show_progress: bool | None = None) -> Run:
    """Train as the recipe says, or go on with the run that the same recipe began.

    The store is prepared first where it is not there yet. Ctrl-C and SIGTERM save and raise KeyboardInterrupt; the
    same call goes on from there. A finished run is returned as it is.

    Args:
        show_progress: a live display; by default where standard error is a terminal, plain lines elsewhere.

    Returns:
        The run, whose best weights stand in ``run.weights``.

    Raises:
        UserError: anything that the user can mend.
        KeyboardInterrupt: interrupted, after saving.
    """
    device = pick_device(recipe.layout.device)
    if device.type == "cpu":
        keep_freed_memory()
    meet()
    sizes = layout_sizes(recipe)
    flight = Path(recipe.run_directory) / "flight"
    join_world(device, flight)
    with watching(flight) as watch:
        agree({"recipe": recipe_to_yaml(recipe), **software()}, {"recipe": _first_differences})
        run, done = _train(recipe, device, Mesh(sizes, device), watch, show_progress)
    if not done:
        raise KeyboardInterrupt
    return run


def _first_differences(usual: str, other: str) -> str:
    """The first differing keys of two recipes in YAML."""
    a, b = (recipe_from_mapping(read_yaml(text, "recipe")[0]) for text in (usual, other))
    return ", ".join(differences(a, b)[:3])


def _train(
    recipe: Recipe, device: torch.device, mesh: Mesh, watch: Watch, show_progress: bool | None
) -> tuple[Run, bool]:
    """The run, and whether it is done: False where somebody interrupted it."""
    world = current_world()
    inputs = open_inputs(recipe, show_progress)
    plan = make_plan(recipe, inputs.stream.samples_per_epoch)
    leads = world.rank == 0
    with ExitStack() as held, watched_signals() as interruption:
        run = from_rank_0(lambda: _open_run(recipe, inputs, held))
        if run.facts["status"] == "finished":
            return run, True
        trackers = recipe.training.trackers if leads else Trackers()
        with (
            TrainingDisplay(plan.steps, enabled=show_progress if leads else False) as display,
            closing(open_trackers(trackers, run)) as tracker,
            closing(StepProfile(run, recipe.training.profile, world.rank)) as profile,
        ):
            job = make_job(
                recipe,
                run,
                inputs,
                plan,
                device,
                world,
                mesh,
                display=display,
                tracker=tracker,
                profile=profile,
                interruption=interruption,
                watch=watch,
                stragglers=StragglerWatch(world),
            )
            with explained_memory(device, lambda: watch.place, lambda: _what_fits(job)):
                begin(job, inputs)
                run_steps(job)
        finish(job)
    return run, job.done


def _what_fits(job: Job) -> str:
    """What to change where memory ran out."""
    advice = []
    if job.micro_batch > 1:
        advice.append(f"layout.micro_batch: {job.micro_batch} -> {job.micro_batch // 2}")
    if job.recipe.layout.recompute != "full":
        advice.append("layout.recompute: full")
    advice.append("more layout.shard" if job.world.size > 1 else "layout.shard on more processes")
    return ", or ".join(advice)


def layout_sizes(recipe: Recipe) -> dict[Axis, int]:
    """Ranks along each axis; a layout that does not fit is told by the first rank alone."""
    try:
        return fitted_sizes(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        error.told = os.environ.get("RANK", "0") != "0"
        raise


def _open_run(recipe: Recipe, inputs: Inputs, held: ExitStack) -> Run:
    """Make the run directory or go on with it, and hold it."""
    run = Run.create(recipe.run_directory, recipe, inputs.fingerprint)
    held.enter_context(run.lock())
    # Again, as another process may have had it in between.
    run = Run.create(recipe.run_directory, recipe, inputs.fingerprint, holds_lock=True)
    with writing(run.directory):
        inputs.keep_with(run.directory)
    run.record(inputs=inputs.facts)
    return run


def make_job(
    recipe: Recipe,
    run: Run,
    inputs: Inputs,
    plan: Plan,
    device: torch.device,
    world: World,
    mesh: Mesh,
    **watched: Any,
) -> Job:
    """Build what is trained and decide how. Decisions of an earlier process of the same run hold."""
    layout = recipe.layout
    with without_data() if layout.sharded else nullcontext():
        objective = build_objective(recipe, inputs.described)
    if not layout.sharded:
        objective.to(device)
    precision = from_rank_0(lambda: pick_precision(_decided(run, recipe, "precision"), device))
    micro_batch = from_rank_0(
        lambda: choose_micro_batch(
            _micro_batch(run, recipe, plan.batch, mesh.data),
            plan.batch,
            objective,
            precision,
            device,
            mesh.data,
            mesh.size("pipeline"),
            mesh.size("shard", "tensor"),
        )
    )
    preview: Callable[[], list[dict[str, str | bytes]]]
    whole = None
    if layout.sharded or mesh.size("context") > 1:
        whole = WholeCopy(recipe, inputs.described, objective, world)
    from_rank_0(lambda: _check_images(recipe, inputs.described, objective, mesh))
    flops, parameters = objective.flops_per_sample(), _parameters(objective)
    for network in objective.networks.values():
        set_recompute(network, layout.recompute)
        if precision == "fp8":
            use_fp8(network, device)
    placed = parallelize(
        objective,
        layout,
        mesh,
        device,
        torch_dtype(precision) if precision != "fp32" else None,
        context=lambda: autocast(precision, device),
        compressor=partial(_compressor, layout),
    )
    for module in objective.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
    state = TrainingState(objective, recipe, plan.half_life, precision, placed, mesh)
    if whole is not None:
        preview = partial(whole.preview, state, inputs.preview)
    else:
        preview = lambda: inputs.preview(objective) if world.rank == 0 else []  # noqa: E731
    kept = recipe.training.checkpoints
    stopping = recipe.training.early_stopping
    return Job(
        recipe=recipe,
        run=run,
        objective=objective,
        stream=inputs.stream,
        validation=inputs.validation,
        state=state,
        plan=plan,
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        world=world,
        mesh=mesh,
        peak=matmul_peak(device, torch_dtype(precision)),
        flops_per_sample=flops,
        parameters=parameters,
        checkpoints=CheckpointStore(
            run.checkpoints, kept.keep_last, plan.keep_every and max(1, plan.keep_every // plan.batch)
        ),
        preview=preview,
        guards={phase.name: Guard(recipe.training.guard, phase.competes) for phase in objective.phases},
        early_stopping=EarlyStopping(stopping) if stopping else None,
        **watched,
    )


def _check_images(recipe: Recipe, described: Description, objective: Objective, mesh: Mesh) -> None:
    """Raise UserError where the patches of images, of which the data tells, cannot be shared as the layout says."""
    model = recipe.model
    if not isinstance(model, DiffusionTransformerModel) or not isinstance(described, ImageDescription):
        return
    told = getattr(objective, "conditioning", None)
    words = described.caption_tokens if told is not None and told.kind == "text" else 0
    tokens = (described.resolution // model.patch) ** 2 + words
    check_sequence(recipe, mesh.sizes, tokens, f"model.patch ({model.patch}) of {described.resolution} pixels")


def _compressor(layout: Layout) -> Compressor:
    if layout.compression == "powersgd":
        return PowerSGD(layout.compression_rank)
    return HalfSum() if layout.compression == "bf16" else PlainSum()


def _parameters(objective: Objective) -> dict[str, int]:
    return {name: sum(p.numel() for p in network.parameters()) for name, network in objective.networks.items()}


def _micro_batch(run: Run, recipe: Recipe, batch: int, world: World) -> int | Literal["auto"]:
    """What is asked or was decided; on more ranks than it was decided on, no more than each one's share."""
    wanted: int | Literal["auto"] = _decided(run, recipe, "micro_batch")
    decided = recipe.layout.micro_batch == "auto" and wanted != "auto"
    return min(wanted, max(1, batch // world.size)) if decided else wanted


def _decided(run: Run, recipe: Recipe, name: str) -> Any:
    """What the layout asks, or, where it says auto, what an earlier process of the run decided."""
    requested = getattr(recipe.layout, name)
    return run.facts.get("decisions", {}).get(name, "auto") if requested == "auto" else requested


def begin(job: Job, inputs: Inputs) -> None:
    """Go on from the newest intact checkpoint, or write the first one; decide on compiling; record the facts."""
    from_rank_0(job.checkpoints.remove_leftovers)
    if restore(job):
        job.event("resume", f"going on from step {job.progress.step:,} of {job.plan.steps:,}")
    else:
        from_rank_0(lambda: forget(job, 0))  # what a run left whose checkpoints were deleted
        job.checkpoints.save(0, job.state.saved_tensors(), job.facts(), wait=True)

    def measure() -> None:
        for phase in job.objective.phases:
            accumulate(job, phase, job.progress.step)
        clear(job)

    job.began = job.progress.step
    steps_left = job.plan.steps - job.progress.step
    requested = _decided(job.run, job.recipe, "compile")
    by_block = job.recipe.layout.sharded or job.mesh.size("context") > 1
    compiled = decide_compile(requested, job.objective, measure, steps_left, job.device, by_block)
    facts: dict[str, Any] = {
        "status": "running",
        "decisions": {"precision": job.precision, "micro_batch": job.micro_batch, "compile": compiled},
        "parameters": job.parameters,
        "layout": {axis: size for axis, size in job.mesh.sizes.items() if size > 1},
        "flops_per_sample": job.flops_per_sample,
        "peak": job.peak._asdict(),
        "device": device_summary(job.device),
        "ranks": job.world.size,
        "steps": job.plan.steps,
        "batch": job.plan.batch,
        "tokens_per_sample": job.recipe.tokens_per_sample,
        "samples_per_epoch": inputs.stream.samples_per_epoch,
    }
    from_rank_0(lambda: job.run.record(**facts))


def finish(job: Job) -> None:
    """Record how the run stands and, when it is done, export the best weights as plain safetensors."""
    progress = job.progress
    best = {"step": progress.best_step, "loss": progress.best_loss} if progress.best_step is not None else None
    facts: dict[str, Any] = {"best": best, "step": progress.step, "seconds": progress.seconds}
    if job.state.outer:
        facts["low_communication"] = {"bytes_sent": progress.exchanged}
    if not job.done:
        from_rank_0(lambda: job.run.record(status="interrupted", **facts))
        return
    facts |= {"stopped_early": progress.stopped_early, "memory": memory_used(job.device)}

    def export() -> None:
        objective = load_objective(job.run, "best", torch.device("cpu"), alone=True)
        for name, network in objective.networks.items():
            export_weights(job.run.weights / f"{name}.safetensors", network.state_dict(), alone=True)
        job.run.record(status="finished", **facts)

    from_rank_0(export)

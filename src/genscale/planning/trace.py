"""A trace: all tensors that some steps of training come to. What runs in each process of a layout that is verified.

A trace is a folder. Every process writes what is its to write, so that none waits for another one's disk::

    step-0000/0-start/weights-0000.safetensors        before the first step; the file's number is the rank's
    step-0001/0-train/activations-0001.safetensors    what blocks gave: pieces, where ranks have parts of the tokens
    step-0001/0-train/gradients-0000.safetensors      whole, of the global batch
    step-0001/0-train/weights-0000.safetensors        whole, after the update

:class:`Trace` reads it and puts the pieces together.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genscale.objectives.objective import Loss
from genscale.parallel import fsdp
from genscale.parallel.context import Portions
from genscale.parallel.mesh import Mesh
from genscale.parallel.shards import whole
from genscale.recipe.load import load_recipe
from genscale.recipe.schema import Recipe
from genscale.recipe.training import Trackers
from genscale.runs.run import Run
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.progress import TrainingDisplay
from genscale.runtime.stragglers import StragglerWatch
from genscale.runtime.watch import Watch, watching
from genscale.runtime.world import current_world, from_rank_0, join_world
from genscale.training.compilation import set_compiled
from genscale.training.inputs import open_inputs
from genscale.training.interruption import Interruption
from genscale.training.job import Job
from genscale.training.plan import make_plan
from genscale.training.profile import StepProfile
from genscale.training.run import layout_sizes, make_job
from genscale.training.step import accumulate, apply, clear, own_slices
from genscale.training.trackers import open_trackers


def write_trace(recipe: Recipe, folder: Path, steps: int) -> None:
    """Run so many steps as this process of the recipe's layout, and write what is this process's of their trace."""
    device = pick_device(recipe.layout.device)
    sizes = layout_sizes(recipe)
    join_world(device)
    with watching() as watch:
        job = _job(recipe, device, Mesh(sizes, device), watch)
        by_block = recipe.layout.sharded or job.mesh.size("context") > 1
        set_compiled(job.objective, recipe.layout.compile is True, by_block)
        with closing(job.tracker), closing(job.profile):
            _run_steps(job, folder, steps)


def _job(recipe: Recipe, device: torch.device, mesh: Mesh, watch: Watch) -> Job:
    world, inputs = current_world(), open_inputs(recipe, show_progress=False)
    plan = make_plan(recipe, inputs.stream.samples_per_epoch)
    run = from_rank_0(lambda: Run.create(recipe.run_directory, recipe, inputs.fingerprint))
    return make_job(
        recipe,
        run,
        inputs,
        plan,
        device,
        world,
        mesh,
        display=TrainingDisplay(plan.steps, enabled=False),
        tracker=open_trackers(Trackers(), run),
        profile=StepProfile(run, None, world.rank),
        interruption=Interruption(),
        watch=watch,
        stragglers=StragglerWatch(world),
    )


def _run_steps(job: Job, folder: Path, steps: int) -> None:
    """As the loop does, without guards, averages, validation and checkpoints."""
    phases, rank = job.objective.phases, job.world.rank
    # Of ranks that have the same stage of a pipeline, the first one writes what is whole.
    leads = job.mesh.rank("replicate", "shard", "expert", "context", "tensor") == 0
    activations = Activations(job)
    first = whole_weights(job, list(job.state.networks))
    _write(_phase_folder(folder, 0, 0, "start") / _file("weights", rank), first if leads else {})
    for step in range(steps):
        measured: dict[str, float] = {}
        sound = True
        for number, phase in enumerate(phases):
            if step % phase.every:
                continue
            place = _phase_folder(folder, step + 1, number, phase.name)
            values = accumulate(job, phase, step)
            _write(place / _file("activations", rank), activations.taken())
            gradients = whole_gradients(job, phase.trains)
            _write(place / _file("gradients", rank), gradients if leads else {})
            if job.state.scaler.overflowed(values["loss"], values["gradient_norm"]):
                sound = False
            else:
                apply(job, phase, step, values["gradient_norm"])
            clear(job)
            weights = whole_weights(job, [phase.trains])
            _write(place / _file("weights", rank), weights if leads else {})
            prefix = f"{phase.name}_" if len(phases) > 1 else ""
            measured |= {prefix + name: value for name, value in values.items()}
        if sound:
            job.objective.observe(measured, job.plan.batch)
        if job.leads:
            (folder / f"step-{step + 1:04}" / "done").touch()


def _phase_folder(folder: Path, step: int, number: int, phase: str) -> Path:
    place = folder / f"step-{step:04}" / f"{number}-{phase}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def _file(kind: str, rank: int) -> str:
    return f"{kind}-{rank:04}.safetensors"


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:
        save_file(tensors, file)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


@torch.no_grad()
def whole_gradients(job: Job, network: str) -> dict[str, Tensor]:
    """Of one network, by the names of its parameters in checkpoints; called by all ranks."""
    placed, found = job.state.placed[network], {}
    for name, parameter in placed.network.named_parameters():
        if not parameter.requires_grad:
            continue
        # None is zero: where some ranks have none, the others do not wait for them in vain.
        gradient = whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if name not in placed.elsewhere:
            found[f"networks.{network}.{name}"] = _kept(gradient)
    return found


@torch.no_grad()
def whole_weights(job: Job, networks: list[str]) -> dict[str, Tensor]:
    """Of some networks, by their names in checkpoints; called by all ranks."""
    found = {}
    for network in networks:
        placed = job.state.placed[network]
        for name, tensor in placed.network.state_dict().items():
            full = whole(tensor)
            if name not in placed.elsewhere:
                found[f"networks.{network}.{name}"] = _kept(full)
    return found


class Activations:
    """Keeps what every block gives, by forward hooks, until it is taken.

    Args:
        job: just made, before its first step.
    """

    def __init__(self, job: Job):
        self._mesh, self._sequence = job.mesh, job.recipe.layout.sequence
        self._outputs: dict[str, Tensor] = {}
        self._position = self._stage = self._order = 0
        self._calls: Counter[str] = Counter()
        keep = torch.compiler.disable(self._keep) if job.recipe.layout.compile is True else self._keep
        for name, network in job.objective.networks.items():
            paths = {module: path for path, module in network.named_modules()}
            stack = getattr(getattr(network, "network", network), "blocks", ())
            for block in fsdp.units(network):
                split = job.mesh.size("context", "tensor") > 1 and any(block is each for each in stack)
                block.register_forward_hook(partial(keep, f"networks.{name}.{paths[block]}", split))
            pipeline = job.state.placed[name].pipeline
            for number, stage in pipeline.stages.items() if pipeline is not None else ():
                stage.register_forward_pre_hook(partial(self._begin_stage, job, number), with_kwargs=True)
        self._watch_micro_batches(job)

    def taken(self) -> dict[str, Tensor]:
        """What blocks gave since the last time, by :class:`Call` as text."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def _watch_micro_batches(self, job: Job) -> None:
        loss = job.objective.loss

        def watched(phase: Any, batch: Any, rng: Any, scalars: dict[str, float]) -> Loss:
            self._begin(int(rng.positions[0]), 0)
            return loss(phase, batch, rng, scalars)

        job.objective.loss = watched  # type: ignore[method-assign]

    def _begin_stage(
        self, job: Job, number: int, stage: nn.Module, told: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        slices, _ = own_slices(job)
        self._begin(slices[int(named["number"])][0], number)

    def _begin(self, position: int, stage: int) -> None:
        self._position, self._stage, self._order = position, stage, 0
        self._calls.clear()

    def _keep(self, name: str, split: bool, block: nn.Module, told: tuple[Any, ...], output: Any) -> None:
        # Within a backward a block runs only because its activations are recomputed: they are here already.
        if not isinstance(output, Tensor) or output.is_meta or torch._C._current_graph_task_id() != -1:
            return
        call = Call(self._position, self._stage, self._order, self._calls[name], name)
        self._calls[name] += 1
        self._order += 1
        if split:
            self._keep_piece(call, output)
        elif self._mesh.rank("context", "tensor") == 0:
            # A micro-batch that is run for nothing has positions of another one, with equal activations.
            self._outputs.setdefault(str(call), _kept(output))

    def _keep_piece(self, call: Call, output: Tensor) -> None:
        """(batch, tokens here, width) of a block whose tokens are split, and which tokens these are."""
        mesh = self._mesh
        parts = mesh.size("tensor") if self._sequence else 1
        if parts == 1 and mesh.rank("tensor") > 0:
            return
        whole_length = output.shape[1] * parts * mesh.size("context")
        if mesh.size("context") > 1:
            tokens = Portions(whole_length, mesh.size("context"), mesh.rank("context")).here()
        else:
            tokens = torch.arange(whole_length)
        self._outputs.setdefault(str(call), _kept(output))
        self._outputs.setdefault(f"{call}{_TOKENS}", tokens.chunk(parts)[mesh.rank("tensor") % parts].clone())


_TOKENS = "/tokens"


class Call(NamedTuple):
    """One forward of a block."""

    position: int
    """In the global batch, of the micro-batch's first sample."""
    stage: int
    """Of a pipeline."""
    order: int
    """Calls of other blocks before it, with this micro-batch and stage."""
    call: int
    """Calls of the same block before it, with this micro-batch."""
    name: str

    def __str__(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Call:
        position, stage, order, call, name = text.split("/")
        return cls(int(position), int(stage), int(order), int(call), name)

    @property
    def on_any_layout(self) -> tuple[int, int, str]:
        """What is the same whatever the layout."""
        return self.position, self.call, self.name


class Trace:
    """Reads a trace.

    Args:
        folder: that the processes wrote to.
        name: of the layout, for messages.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def steps_done(self) -> int:
        return len(list(self.folder.glob("step-*/done")))

    def phases(self, step: int) -> list[str]:
        """The folders of the phases of a step, in order; step 0 is the start."""
        return sorted(place.name for place in (self.folder / f"step-{step:04}").iterdir() if place.is_dir())

    def tensors(self, step: int, phase: str, kind: str) -> dict[str, Path]:
        """The file of each gradient or weight."""
        return {name: file for file, names in self._files(step, phase, kind) for name in names}

    def calls(self, step: int, phase: str) -> dict[tuple[int, int, str], list[tuple[Path, Call]]]:
        """The pieces of each activation, in the order of the forward."""
        pieces: dict[tuple[int, int, str], list[tuple[Path, Call]]] = defaultdict(list)
        for file, names in self._files(step, phase, "activations"):
            for name in names:
                if not name.endswith(_TOKENS):
                    call = Call.parse(name)
                    pieces[call.on_any_layout].append((file, call))
        return dict(sorted(pieces.items(), key=lambda item: min(call[:3] for _, call in item[1])))

    def _files(self, step: int, phase: str, kind: str) -> Iterator[tuple[Path, list[str]]]:
        for file in sorted((self.folder / f"step-{step:04}" / phase).glob(f"{kind}-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                yield file, list(opened.keys())

    @staticmethod
    def read(file: Path, name: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def activation(self, pieces: list[tuple[Path, Call]]) -> Tensor:
        """Put together from its pieces; ranks may have the same one."""
        file, call = pieces[0]
        first = self.read(file, str(call))
        with safe_open(file, framework="pt") as opened:
            if f"{call}{_TOKENS}" not in opened.keys():  # noqa: SIM118
                return first
        parts = [(self.read(file, str(call)), self.read(file, f"{call}{_TOKENS}")) for file, call in pieces]
        length = 1 + max(int(tokens.max()) for _, tokens in parts)
        full = first.new_full((first.shape[0], length, *first.shape[2:]), torch.nan)
        for part, tokens in parts:
            full[:, tokens] = part
        return full


def main(arguments: list[str]) -> None:
    """``python -m genscale.planning.trace RECIPE FOLDER STEPS``, in each process, with torchrun's variables set."""
    recipe, folder, steps = arguments
    try:
        write_trace(load_recipe(recipe), Path(folder), int(steps))
    except UserError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])

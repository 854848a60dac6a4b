"""The same steps on two layouts, and the first tensor that differs."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genscale.objectives.build import build_objective
from genscale.parallel.fit import fitted_sizes
from genscale.parallel.mesh import DATA
from genscale.parallel.parallelize import without_data
from genscale.planning.compare import Comparison, compare
from genscale.planning.trace import Trace
from genscale.recipe.dialect import read_yaml
from genscale.recipe.layout import AXES, Axis, Layout
from genscale.recipe.load import recipe_from_mapping, recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runtime.device import pick_device
from genscale.runtime.errors import UserError, nearest
from genscale.runtime.progress import StageDisplay
from genscale.runtime.world import World
from genscale.training.inputs import open_inputs
from genscale.training.micro_batch import choose_micro_batch
from genscale.training.plan import Plan, make_plan

_SAME_ON_BOTH = ("device", "micro_batch")
"""What a layout says that is decided for both together."""
_AXES = tuple(axis for axis in AXES if axis in Layout.model_fields)


def laid_out(recipe: Recipe, layout: str, option: str = "layout", keeps: Collection[str] = ()) -> Recipe:
    """The recipe on a layout such as ``tensor=2,shard=2`` or ``single``, in fp32 and not compiled.

    Axes that are not named have one rank. Other keys of the recipe's layout stay: ``sequence=false`` and the like may
    stand among the axes. ``single`` is one process.

    Args:
        option: which option of a command it was given by, for messages.
        keeps: of ``precision`` and ``compile``, what stays as the recipe says.

    Raises:
        UserError: it is none, or does not fit the model.
    """
    mapping = recipe.model_dump(mode="json")
    plain = Layout().model_dump(mode="json")
    base = mapping["layout"]
    same = {name: base[name] for name in (*_SAME_ON_BOTH, *keeps)}
    base |= dict.fromkeys(_AXES, 1)
    if layout == "single":
        base = plain | {"replicate": 1}
    mapping["layout"] = base | {"precision": "fp32", "compile": False} | same | _named_in(layout, option)
    mapping["training"]["low_communication"] = None  # groups that train apart learn something else
    laid = recipe_from_mapping(mapping, f"{option} '{layout}'")
    fitted_sizes(laid, processes(laid))
    return laid


def _named_in(layout: str, option: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    known = [name for name in Layout.model_fields if name not in _SAME_ON_BOTH]
    for part in layout.split(",") if layout != "single" else ():
        name, equals, text = (each.strip() for each in part.partition("="))
        if not equals or not text:
            hint = nearest(part.strip(), ["single"]) or "expected axes such as tensor=2,shard=2, or single"
            raise UserError(f"{option} '{layout}': {hint.removeprefix(', ')}")
        if name not in known:
            hint = nearest(name, known) or f"; the axes are {', '.join(_AXES)}"
            raise UserError(f"{option} '{layout}': no axis '{name}'{hint}")
        named[name] = read_yaml(text, f"{option} '{layout}'")[0]
    return named


def processes(recipe: Recipe) -> int:
    """How many the recipe's layout takes, where ``replicate: auto`` is one."""
    return math.prod(_sizes(recipe).values())


def _sizes(recipe: Recipe) -> dict[Axis, int]:
    sizes: dict[Axis, Any] = {axis: getattr(recipe.layout, axis) for axis in _AXES}
    return {axis: 1 if size == "auto" else size for axis, size in sizes.items()}


def verify(
    recipe: Recipe,
    against: Recipe,
    *,
    steps: int = 3,
    tolerance: float = 1e-4,
    show_progress: bool | None = None,
    folder: Path | None = None,
) -> Comparison:
    """Run the first steps of two recipes that differ in their layouts, and compare all that they come to.

    Each layout runs on processes of this machine, one layout after the other, away from the recipe's run directory. The
    store is prepared first where it is not there yet.

    Args:
        recipe, against: as :func:`laid_out` makes them.
        steps: at most those of the recipe's budget.
        tolerance: of a difference, as a part of the tensor's largest absolute value.
        folder: where traces are kept; by default in a temporary one that is removed.

    Raises:
        UserError: a layout does not fit, or the two cannot give the same.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("verify starts the processes of both layouts itself; start it without torchrun")
    _check_dropout(recipe, against)
    recipe, against, plan, names = _alike(recipe, against, show_progress)
    steps = min(steps, plan.steps)
    titles = _titles(recipe, against)
    kept = tempfile.TemporaryDirectory(prefix="genscale-verify-") if folder is None else nullcontext(str(folder))
    with kept as place, StageDisplay(enabled=show_progress) as display:
        traces = []
        for number, (one, title) in enumerate(zip((recipe, against), titles, strict=True)):
            trace = Trace(Path(place) / f"layout-{number + 1}", title)
            record(one, trace, steps, partial(display, title, total=steps, unit="steps"))
            traces.append(trace)
        return compare(traces[0], traces[1], steps, tolerance, names)


def _check_dropout(*recipes: Recipe) -> None:
    for recipe in recipes:
        sizes = _sizes(recipe)
        rate = getattr(recipe.model, "dropout", 0.0)
        splits = [axis for axis in ("tensor", "context", "pipeline") if sizes[axis] > 1]  # type: ignore[index]
        if rate and splits:
            raise UserError(
                f"model.dropout: {rate:g} drops others where layout.{splits[0]} is {sizes[splits[0]]}, "  # type: ignore[index]
                "so that nothing would be the same; set model.dropout=0"
            )


def _alike(recipe: Recipe, against: Recipe, show_progress: bool | None) -> tuple[Recipe, Recipe, Plan, list[str]]:
    """Both with the same micro-batches on the same kind of device; the plan; the names of all weights, in order."""
    recipes = [recipe, against]
    wanted = recipe.layout.device
    if wanted == "auto" and torch.accelerator.device_count() < max(map(processes, recipes)):
        wanted = "cpu"
    device = pick_device(wanted)
    inputs = open_inputs(recipe, show_progress)
    if against.data != recipe.data:
        open_inputs(against, show_progress)
    plan = make_plan(recipe, inputs.stream.samples_per_epoch)
    with without_data():
        objective = build_objective(recipe, inputs.described)

    def chosen(one: Recipe, requested: Any) -> int:
        sizes = _sizes(one)
        data = World(0, math.prod(sizes[axis] for axis in DATA))
        return choose_micro_batch(
            requested, plan.batch, objective, one.layout.precision, device, data, sizes["pipeline"]
        )

    def accepted(size: int) -> bool:
        try:
            return all(chosen(one, size) == size for one in recipes)
        except UserError:
            return False

    size = min(chosen(one, one.layout.micro_batch) for one in recipes)
    if recipe.layout.micro_batch == "auto":
        size = next((each for each in range(size, 0, -1) if accepted(each)), 1)
    for one in recipes:
        chosen(one, size)
    recipe, against = (_changed(one, {"layout.micro_batch": size, "layout.device": wanted}) for one in recipes)
    return recipe, against, plan, [f"networks.{name}" for name in objective.networks.state_dict()]


def _changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    mapping = recipe.model_dump(mode="json")
    for key, value in values.items():
        *parts, last = key.split(".")
        here = mapping
        for part in parts:
            here = here[part]
        here[last] = value
    return recipe_from_mapping(mapping)


def _titles(*recipes: Recipe) -> list[str]:
    """What a person would call the layouts: ``tensor=2,sequence=false``, ``single``."""
    plain = Layout(replicate=1).model_dump(mode="json")
    titles = []
    for recipe in recipes:
        sizes: dict[str, Any] = {str(axis): size for axis, size in _sizes(recipe).items()}
        layout = sizes | recipe.layout.model_dump(mode="json") | sizes  # the axes first
        named = [
            f"{name}={str(value).lower()}"
            for name, value in layout.items()
            if value != plain[name] and name not in (*_SAME_ON_BOTH, "precision", "compile")
        ]
        titles.append(",".join(named) or "single")
    if len(set(titles)) < len(titles):
        titles = [f"{title} ({number + 1})" for number, title in enumerate(titles)]
    return titles


def record(recipe: Recipe, trace: Trace, steps: int, on_progress: Callable[[int], None] = lambda done: None) -> None:
    """Start the processes of the recipe's layout, wait for their trace.

    Raises:
        UserError: what one of the processes says is wrong, or one was killed.
        RuntimeError: a fault in one of them, with its traceback.
    """
    count, folder = processes(recipe), trace.folder
    folder.mkdir(parents=True)
    quiet: dict[str, Any] = {"run": str(folder / "run"), "training.trackers": {}, "training.profile": None}
    (folder / "recipe.yaml").write_text(recipe_to_yaml(_changed(recipe, quiet)))
    command = [sys.executable, "-m", "genscale.planning.trace", str(folder / "recipe.yaml"), str(folder), str(steps)]
    on_progress(0)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank, variables in enumerate(_seats(count)):
            with open(folder / f"rank-{rank:04}.txt", "wb") as printed:
                started.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=variables)
                )
        _wait(started, lambda: on_progress(trace.steps_done()))
    finally:
        codes = [process.poll() for process in started]
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        raise _failure(trace, codes)
    on_progress(steps)


def _seats(count: int) -> Iterator[dict[str, str]]:
    """The environment of each process, as torchrun would set it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    for rank in range(count):
        yield {
            "OMP_NUM_THREADS": str(threads),
            **inherited,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


_GRACE = 15.0
"""Seconds that the other processes have to end by themselves, and to say why, after one has failed."""


def _wait(started: list[subprocess.Popen[bytes]], looked: Callable[[], None]) -> None:
    deadline = math.inf
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if deadline == math.inf and any(process.poll() for process in started):
            deadline = time.monotonic() + _GRACE
        looked()
        time.sleep(0.05)


def _failure(trace: Trace, codes: list[int | None]) -> Exception:
    """Of the processes, what one of them says was the matter."""
    printed = [(trace.folder / f"rank-{rank:04}.txt").read_text(errors="replace") for rank in range(len(codes))]
    for text in printed:
        if "Traceback" in text:
            return RuntimeError(f"a process of the layout {trace.name} failed:\n{text[-6000:]}")
    for text in printed:
        for line in text.splitlines():
            if line.startswith("error: "):
                return UserError(f"{trace.name}: {line.removeprefix('error: ')}")
    rank = next(rank for rank, code in enumerate(codes) if code)
    return UserError(
        f"{trace.name}: process {rank} of {len(codes)} ended with code {codes[rank]} and said nothing; was it killed "
        "for want of memory?"
    )

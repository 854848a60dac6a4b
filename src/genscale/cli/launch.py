"""Starting a run elsewhere: ``genscale train --on``, and ``genscale launch``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from genscale.cli.groups import Commands
from genscale.runtime.errors import UserError

if TYPE_CHECKING:
    from genscale.recipe.schema import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])

_SLURM_ONLY = ("nodes", "gpus_per_node", "time", "partition", "account", "sbatch")
_OPTIONS = {
    "--on": {"type": click.Choice(["slurm", "ssh"]), "help": "Train there instead of here."},
    "--nodes": {"type": click.IntRange(min=1), "help": "slurm: how many machines; 1 if not given."},
    "--hosts": {"metavar": "HOST,HOST", "help": "ssh: the machines, which see the same files."},
    "--processes-per-node": {"type": click.IntRange(min=1), "help": "One for each accelerator; 1 if not given."},
    "--gpus-per-node": {
        "type": click.IntRange(min=0),
        "help": "slurm: by default as many as processes, none for a recipe on the CPU.",
    },
    "--time": {"help": "slurm: the longest that it may take at a stretch, such as 24:00:00; it goes on after that."},
    "--partition": {"help": "slurm: where it runs."},
    "--account": {"help": "slurm: who pays."},
    "--sbatch": {"multiple": True, "metavar": "OPTION", "help": "slurm: a further option, such as --constraint=h100."},
    "--dry-run": {"is_flag": True, "help": "Print what would be submitted or run."},
}


def elsewhere_options(command: Command) -> Command:
    """The options of ``train`` that say where."""
    for name, settings in reversed(_OPTIONS.items()):
        command = click.option(name, **settings)(command)  # type: ignore[arg-type]
    return command


def train_elsewhere(recipe: Recipe, words: tuple[str, ...], asked: dict[str, Any]) -> int | None:
    """Submit or run ``genscale train`` as asked; an exit code, or None where no place but this one is asked for.

    Args:
        words: what follows ``genscale train``.
        asked: by the names of :func:`elsewhere_options`.
    """
    place = asked["on"]
    foreign = {"slurm": ("hosts",), "ssh": _SLURM_ONLY}.get(
        place, (*_SLURM_ONLY, "hosts", "processes_per_node", "dry_run")
    )
    for name in foreign:
        if asked[name] not in (None, False, ()):
            needed = "--on slurm or --on ssh" if place is None else f"--on {'ssh' if place == 'slurm' else 'slurm'}"
            raise UserError(f"--{name.replace('_', '-')} goes with {needed}")
    if place is None:
        return None
    return _on_slurm(recipe, words, asked) if place == "slurm" else _on_hosts(recipe, words, asked)


def _on_slurm(recipe: Recipe, words: tuple[str, ...], asked: dict[str, Any]) -> int:
    from genscale.clusters.slurm import SlurmJob, job_script, submit
    from genscale.parallel.fit import fitted_sizes

    nodes, processes = asked["nodes"] or 1, asked["processes_per_node"] or 1
    fitted_sizes(recipe, nodes * processes)  # told now, and not when the job's turn has come
    job = SlurmJob(
        name=recipe.name,
        nodes=nodes,
        processes_per_node=processes,
        gpus_per_node=_gpus(recipe, processes, asked["gpus_per_node"]),
        time=asked["time"],
        partition=asked["partition"],
        account=asked["account"],
        options=asked["sbatch"],
    )
    script = job_script(job, [sys.executable, "-m", "genscale", "train", *words])
    if asked["dry_run"]:
        click.echo(script, nl=False)
        return 0
    file = Path(f"{recipe.name}.sbatch")
    number = submit(script, file)
    click.echo(f"job {number} of {file}; its log: {Path.cwd() / f'{recipe.name}-{number}.log'}")
    click.echo(f"next: squeue --job {number}    tail -F {recipe.name}-{number}.log    scancel {number}")
    return 0


def _on_hosts(recipe: Recipe, words: tuple[str, ...], asked: dict[str, Any]) -> int:
    from genscale.clusters.ssh import Hosts, host_names, run_on_hosts
    from genscale.parallel.fit import fitted_sizes

    if asked["hosts"] is None:
        raise UserError("--on ssh needs --hosts host1,host2")
    hosts = Hosts(host_names(asked["hosts"]), asked["processes_per_node"] or 1)
    fitted_sizes(recipe, len(hosts.names) * hosts.processes_per_node)
    command = ("-m", "genscale", "train", *words)
    if asked["dry_run"]:
        for index in range(len(hosts.names)):
            click.echo(shlex.join(hosts.command(index, command, os.environ)))
        return 0
    failed = run_on_hosts(hosts, command, os.environ, click.echo)
    if failed is None:
        return 0
    if failed.code == 255:  # ssh's own
        raise UserError(f"{failed.host}: cannot be reached by ssh; the other hosts were ended")
    click.echo(f"{failed.host} ended with code {failed.code}; the other hosts were ended", err=True)
    return 1


def _gpus(recipe: Recipe, processes: int, asked: int | None) -> int:
    """One for each process, unless asked otherwise; none for a recipe that says to train on the CPU."""
    if asked is not None:
        return asked
    return 0 if recipe.layout.device == "cpu" else processes


@click.group("launch", cls=Commands)
def launch() -> None:
    """Start a run on a cluster that takes manifests."""


@launch.command("kubernetes")
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--image", required=True, help="A container image with genscale in it.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="How many pods.")
@click.option(
    "--processes-per-node",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="In each pod; one for each accelerator.",
)
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=0),
    help="In each pod; by default as many as processes, none for a recipe on the CPU.",
)
@click.option("--volume", metavar="CLAIM:PATH", help="A persistent volume claim, mounted at PATH: runs and stores.")
@click.option("--namespace", help="By default kubectl's own.")
@click.option("--name", help="By default the recipe's.")
@click.option(
    "--kind",
    type=click.Choice(["PyTorchJob", "TrainJob"]),
    default="PyTorchJob",
    show_default=True,
    help="What the cluster takes: Kubeflow's training operator the one, Kubeflow Trainer the other.",
)
@click.option("--dry-run", is_flag=True, help="Print the manifest.")
def kubernetes(recipe: str, overrides: tuple[str, ...], **asked: Any) -> None:
    """Train as a job of Kubeflow's operators.

    RECIPE and OVERRIDES are as in 'genscale train'. The recipe travels with the job; the data has to be where the pods
    see it. Without --volume the run is lost with its pods.
    """
    from genscale.clusters.kubernetes import KubernetesJob, apply, job_name, manifest
    from genscale.parallel.fit import fitted_sizes
    from genscale.recipe.load import load_recipe, recipe_to_yaml

    loaded = load_recipe(recipe, overrides)
    fitted_sizes(loaded, asked["nodes"] * asked["processes_per_node"])
    job = KubernetesJob(
        name=asked["name"] or job_name(loaded.name),
        recipe=recipe_to_yaml(loaded),
        image=asked["image"],
        nodes=asked["nodes"],
        processes_per_node=asked["processes_per_node"],
        gpus_per_node=_gpus(loaded, asked["processes_per_node"], asked["gpus_per_node"]),
        namespace=asked["namespace"],
        volume=_volume(asked["volume"]),
    )
    text = manifest(asked["kind"], job)
    if asked["dry_run"]:
        click.echo(text, nl=False)
        return
    click.echo(apply(text))
    where = f" --namespace {job.namespace}" if job.namespace else ""
    click.echo(f"next: kubectl get pods{where} --watch    kubectl delete {asked['kind'].lower()} {job.name}{where}")


def _volume(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    claim, _, path = text.partition(":")
    if not claim or not path.startswith("/"):
        raise UserError(f"--volume: expected CLAIM:/PATH, found {text!r}")
    return claim, path

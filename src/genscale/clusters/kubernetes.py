"""Training as a job of Kubeflow's training operator (PyTorchJob) or of its successor, Kubeflow Trainer (TrainJob)."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from genscale.runtime.errors import UserError

Kind = Literal["PyTorchJob", "TrainJob"]

_RECIPE_FOLDER = "/etc/genscale"
_TORCHRUN = ["torchrun", "-m", "genscale", "train", f"{_RECIPE_FOLDER}/recipe.yaml"]
"""Both operators describe the cluster to torchrun in variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, ...)."""
_TIME_TO_LEAVE = 30
"""Seconds that torchrun keeps to itself of the time in which a pod has to end."""


@dataclass(frozen=True)
class KubernetesJob:
    """What is asked of the cluster."""

    name: str
    recipe: str
    """The resolved recipe as YAML, which travels with the job."""
    image: str
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    namespace: str | None = None
    volume: tuple[str, str] | None = None
    """A persistent volume claim and the folder where it is mounted, in which runs and stores are written."""
    grace: int = 600
    """Seconds that a pod has to save and end, once it is told to."""
    restarts: int = 10


def manifest(kind: Kind, job: KubernetesJob) -> str:
    """The recipe as a config map and the job that trains it, as YAML for ``kubectl apply``."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", job.name):
        raise UserError(f"--name: expected up to 40 of a-z, 0-9 and -, beginning with a letter, found {job.name!r}")
    recipe = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job),
        "data": {"recipe.yaml": job.recipe},
    }
    return yaml.dump_all([recipe, _KINDS[kind](job)], Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply(text: str) -> str:
    """Hand a manifest to kubectl; what it says."""
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not installed here; print the manifest with --dry-run and apply it where it is")
    done = subprocess.run(["kubectl", "apply", "--filename=-"], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise UserError(f"kubectl apply: {told[-1].removeprefix('error: ')}")
    return done.stdout.strip()


def job_name(recipe_name: str) -> str:
    """A recipe's name as Kubernetes takes it."""
    name = re.sub(r"[^a-z0-9]+", "-", recipe_name.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:40].rstrip("-")


def _metadata(job: KubernetesJob) -> dict[str, Any]:
    return {"name": job.name} | ({"namespace": job.namespace} if job.namespace else {})


def _pytorch_job(job: KubernetesJob) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": job.image,
        "command": _command(job),
        "env": _environment(job),
        "volumeMounts": _mounts(job),
    }
    if job.gpus_per_node:
        container["resources"] = _resources(job)
    replica = {
        # Torchrun ends with 1 whatever happened: nobody can tell a preempted process from a broken one.
        "restartPolicy": "OnFailure",
        "template": {
            "spec": {
                "terminationGracePeriodSeconds": job.grace,
                "containers": [container],
                "volumes": _volumes(job),
            }
        },
    }
    replicas = {"Master": {"replicas": 1, **replica}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": job.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _train_job(job: KubernetesJob) -> dict[str, Any]:
    trainer: dict[str, Any] = {
        "image": job.image,
        "command": _command(job),
        "env": _environment(job),
        "numNodes": job.nodes,
        "numProcPerNode": job.processes_per_node,
    }
    if job.gpus_per_node:
        trainer["resourcesPerNode"] = _resources(job)
    pod = {
        "terminationGracePeriodSeconds": job.grace,
        "containers": [{"name": "node", "volumeMounts": _mounts(job)}],
        "volumes": _volumes(job),
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {"template": {"spec": {"replicatedJobs": [node]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": trainer,
            "runtimePatches": [{"manager": "genscale.org/launch", "trainingRuntimeSpec": patch}],
        },
    }


_KINDS = {"PyTorchJob": _pytorch_job, "TrainJob": _train_job}


def _command(job: KubernetesJob) -> list[str]:
    """Runs and stores are written into the current folder, which a TrainJob cannot set by itself."""
    return ["sh", "-c", f'cd "$0" && exec {" ".join(_TORCHRUN)}', job.volume[1]] if job.volume else _TORCHRUN


def _environment(job: KubernetesJob) -> list[dict[str, str]]:
    return [{"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(max(1, job.grace - _TIME_TO_LEAVE))}]


def _resources(job: KubernetesJob) -> dict[str, Any]:
    return {"limits": {"nvidia.com/gpu": job.gpus_per_node}}


def _mounts(job: KubernetesJob) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "recipe", "mountPath": _RECIPE_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    return [*mounts, {"name": "runs", "mountPath": job.volume[1]}] if job.volume else mounts


def _volumes(job: KubernetesJob) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": job.name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # 64 MiB otherwise, too little for NCCL
    ]
    claim = job.volume and {"name": "runs", "persistentVolumeClaim": {"claimName": job.volume[0]}}
    return [*volumes, claim] if claim else volumes


class _Dumper(yaml.SafeDumper):
    """Writes the recipe as the block of lines that it is, and what stands twice, twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

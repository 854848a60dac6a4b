"""Manifests for Kubeflow's operators, through the command line as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from genscale.clusters.kubernetes import KubernetesJob, job_name, manifest
from genscale.recipe.load import load_recipe, recipe_from_mapping
from genscale.runtime.errors import UserError

BASE = ("launch", "kubernetes", "tiny", "--image", "registry/genscale:1")


def genscale(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genscale", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def printed(*words: str) -> list[dict[str, Any]]:
    done = genscale(*BASE, *words, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def test_a_pytorch_job_starts_torchrun_in_each_pod():
    config, job = printed("--nodes", "4", "--processes-per-node", "2", "--namespace", "research")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"] == config["metadata"] == {"name": "tiny", "namespace": "research"}
    assert job["spec"]["nprocPerNode"] == "2"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    [container] = pod["containers"]
    assert (container["name"], container["image"]) == ("pytorch", "registry/genscale:1")
    assert container["command"] == ["torchrun", "-m", "genscale", "train", "/etc/genscale/recipe.yaml"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"recipe": "/etc/genscale", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)


def test_a_pod_that_must_go_has_time_to_save():
    """Torchrun's own patience of 30 seconds would otherwise end the processes long before the pod's."""
    _, job = printed()
    pod = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] == 600
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "570"
    assert job["spec"]["pytorchReplicaSpecs"]["Master"]["restartPolicy"] == "OnFailure"


def test_one_node_has_no_workers_and_a_recipe_on_the_cpu_no_gpus():
    _, job = printed("layout.device=cpu")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master"]
    assert "resources" not in replicas["Master"]["template"]["spec"]["containers"][0]


def test_a_train_job_says_the_same_to_the_newer_operator():
    words = ("--kind", "TrainJob", "--nodes", "4", "--processes-per-node", "2", "--volume", "models:/mnt/it's here")
    _, job = printed(*words)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 2)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 2}}
    assert trainer["command"][-1] == "/mnt/it's here"
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["name"] == node["name"] == "node"
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "models"}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/mnt/it's here"} in pod["containers"][0]["volumeMounts"]


def test_the_run_is_written_into_the_volume(tmp_path):
    """With a torchrun that says where it is started."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    (tmp_path / "torchrun").write_text('#!/bin/sh\npwd; echo "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    text = manifest("PyTorchJob", KubernetesJob("x", "name: x\n", "image", volume=("claim", str(folder))))
    job = list(yaml.safe_load_all(text))[1]
    command = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": path}, check=True)
    assert done.stdout.splitlines() == [str(folder), "-m genscale train /etc/genscale/recipe.yaml"]


def test_the_recipe_travels_with_the_job():
    config, _ = printed("training.budget=7 steps")
    carried = recipe_from_mapping(yaml.safe_load(config["data"]["recipe.yaml"]))
    assert carried == load_recipe("tiny", ["training.budget=7 steps"])


def test_kubectl_is_given_the_manifest_and_its_answer_is_shown(tmp_path: Path):
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\ncat > {tmp_path}/given\necho "$@"\necho pytorchjob created\n')
    (tmp_path / "kubectl").chmod(0o755)
    done = genscale(*BASE, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("apply --filename=-\npytorchjob created\nnext: kubectl get pods --watch")
    assert (tmp_path / "given").read_text() == genscale(*BASE, "--dry-run").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BASE], "error: kubectl is not installed here; print the manifest with --dry-run"),
        ([*BASE, "--nodes", "0"], "Invalid value for '--nodes'"),
        ([*BASE, "--volume", "claim"], "error: --volume: expected CLAIM:/PATH, found 'claim'"),
        ([*BASE, "--name", "My_Run"], "error: --name: expected up to 40 of a-z, 0-9 and -"),
        ([*BASE, "--kind", "Job"], "Invalid value for '--kind'"),
        ([*BASE, "model.layerz=3"], "did you mean 'layers'?"),
        (["launch", "kubernetes", "tiny"], "Missing option '--image'."),
        (["launch", "kubernets", "tiny"], "no command 'kubernets', did you mean 'kubernetes'?"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path):
    done = genscale(*words, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_kubectl_refuses_is_one_line(tmp_path):
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho "error: no matches for kind PyTorchJob" >&2\nexit 1\n')
    (tmp_path / "kubectl").chmod(0o755)
    done = genscale(*BASE, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (2, "error: kubectl apply: no matches for kind PyTorchJob\n")


@pytest.mark.parametrize(
    ("recipe", "name"), [("tiny", "tiny"), ("GPT2_124M.v2", "gpt2-124m-v2"), ("8b", "run-8b"), ("x" * 60, "x" * 40)]
)
def test_a_recipes_name_becomes_one_that_kubernetes_takes(recipe, name):
    assert job_name(recipe) == name
    manifest("PyTorchJob", KubernetesJob(name, "", "image"))


def test_a_name_that_kubernetes_does_not_take():
    with pytest.raises(UserError, match="expected up to 40"):
        manifest("TrainJob", KubernetesJob("a" * 41, "", "image"))

"""What clusters that do not speak torchrun's language say about who meets whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import free_port
from small import recipe, small_store

from genscale.recipe.load import recipe_to_yaml
from genscale.recipe.schema import Recipe
from genscale.runs.run import Run
from genscale.runtime.errors import UserError
from genscale.runtime.rendezvous import first_host, rendezvous

__all__ = ["recipe", "small_store"]


def tf_config(kind: str, index: int, **cluster: list[str]) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def slurm(**changed: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        **changed,
    }


def test_workers_of_a_tf_config_meet_at_the_first():
    assert rendezvous(tf_config("worker", 1, worker=["a:1234", "b:5678"])) == {
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1234",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }


@pytest.mark.parametrize("name", ["chief", "master"])
def test_the_chief_comes_before_the_workers(name):
    cluster = {"worker": ["a:1", "b:2"], name: ["c:3"]}
    chief, worker = rendezvous(tf_config(name, 0, **cluster)), rendezvous(tf_config("worker", 1, **cluster))
    assert (chief["RANK"], worker["RANK"]) == ("0", "2")
    assert chief["MASTER_ADDR"] == worker["MASTER_ADDR"] == "c"


def test_workers_on_one_host_use_its_devices_in_turn():
    cluster = ["a:1", "b:1", "a:2", "b:2"]
    ranks = [rendezvous(tf_config("worker", index, worker=cluster))["LOCAL_RANK"] for index in range(4)]
    assert ranks == ["0", "0", "1", "1"]


def test_an_ipv6_address_keeps_its_colons():
    found = rendezvous(tf_config("worker", 0, worker=["::1:29500", "::1:29501"]))
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("::1", "29500")


@pytest.mark.parametrize("text", ["", "{}", '{"task": {"type": "worker", "index": 0}}', '{"cluster": {}}'])
def test_a_tf_config_without_a_cluster_is_a_process_on_its_own(text):
    assert rendezvous({"TF_CONFIG": text}) == {}


def test_a_single_worker_is_a_process_on_its_own():
    assert rendezvous(tf_config("worker", 0, worker=["a:1234"])) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TF_CONFIG": "{'cluster'"}, "TF_CONFIG: not JSON"),
        ({"TF_CONFIG": "[1]"}, "TF_CONFIG: expected an object, found [1]"),
        ({"TF_CONFIG": '{"cluster": "a:1"}'}, "TF_CONFIG: cluster: expected an object, found 'a:1'"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, "TF_CONFIG: task: expected an object, found None"),
        (
            {"TF_CONFIG": '{"cluster": {"worker": 3}, "task": {}}'},
            "cluster: worker: expected a list of addresses, found 3",
        ),
        (tf_config("worker", 0, worker=["a", "b:1"]), "expected addresses such as 'host:1234', found 'a'"),
        (tf_config("worker", 2, worker=["a:1", "b:1"]), "no 'worker' with index 2 in the cluster"),
        (tf_config("chief", 0, worker=["a:1", "b:1"]), "no 'chief' with index 0 in the cluster"),
        (tf_config("ps", 0, worker=["a:1"], ps=["b:1"]), "genscale trains without parameter servers"),
        (tf_config("evaluator", 0, worker=["a:1"]), "genscale trains without evaluators"),
    ],
)
def test_a_tf_config_that_does_not_say_who_meets_whom(environment, message):
    with pytest.raises(UserError) as told:
        rendezvous(environment)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_what_torchrun_has_set_stands():
    torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    assert rendezvous(slurm() | torchrun) == {}
    assert rendezvous(tf_config("worker", 0, worker=["a:1", "b:1"]) | torchrun) == {}


def test_the_tasks_of_a_slurm_step_meet_on_the_first_node():
    assert rendezvous(slurm()) == {
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "14711",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
    }


def test_an_address_and_a_port_that_are_set_stand():
    found = rendezvous(slurm(MASTER_ADDR="10.0.0.7", MASTER_PORT="29500"))
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["RANK"]) == ("10.0.0.7", "29500", "3")


def test_a_batch_script_and_a_lone_task_are_no_step_of_several_tasks():
    """Slurm gives SLURM_NTASKS and SLURM_PROCID to the batch script as well."""
    assert rendezvous({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "n[1-2]"}) == {}
    assert rendezvous(slurm(SLURM_STEP_NUM_TASKS="1")) == {}


def test_steps_that_run_at_once_meet_at_ports_of_their_own():
    ports = {
        rendezvous(slurm(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))["MASTER_PORT"]
        for job in range(100)
        for step in range(3)
    }
    assert len(ports) == 300
    assert all(10_000 <= int(port) < 30_000 for port in ports)


@pytest.mark.parametrize(("visible", "local_rank"), [("0,1,2,3", "1"), ("2", "0")])
def test_a_task_that_is_bound_to_one_device_takes_that_one(visible, local_rank):
    assert rendezvous(slurm(CUDA_VISIBLE_DEVICES=visible))["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3,7]", "n1"),
        ("n[7,1-3]", "n7"),
        ("n[007-010],m1", "n007"),
        ("rack[07-09,12]-n[1,3],login", "rack07-n1"),
        ("gpu-a.site.org,gpu-b.site.org", "gpu-a.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_an_empty_node_list():
    with pytest.raises(UserError, match="expected names such as"):
        first_host("")


@pytest.mark.slow
def test_two_processes_that_tf_config_describes_train_one_model(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(recipe_to_yaml(recipe(**{"training.budget": "2 steps", "layout.micro_batch": 4})))
    cluster = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "genscale", "train", str(file)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **tf_config("worker", index, worker=cluster)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert ["2 steps, best validation loss" in text for text in printed] == [True, False]
    assert Run.open(tmp_path / "run").facts["ranks"] == 2


def test_a_wrong_tf_config_ends_the_command_with_one_line(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(recipe_to_yaml(recipe()))
    command = [sys.executable, "-m", "genscale", "train", str(file)]
    environment = {**os.environ, **tf_config("ps", 0, worker=["a:1"], ps=["b:1"])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    line = "error: TF_CONFIG: genscale trains without parameter servers; start it on chief and workers only\n"
    assert done.stderr == line

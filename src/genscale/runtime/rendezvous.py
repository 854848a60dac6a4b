"""Where the processes of a run meet, on clusters that do not say it as torchrun does.

Torch reads MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK. Here they are worked out from TF_CONFIG, in
which clusters made for TensorFlow's distributed strategies describe themselves, and from the variables that Slurm gives
the tasks of ``srun``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from genscale.runtime.errors import UserError

_NOT_TRAINED_ON = {"ps": "parameter servers", "evaluator": "evaluators"}
_TRAINED_ON = ("chief", "master", "worker")
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def meet() -> None:
    """Add to this process's environment what torch needs to meet the others of the run."""
    os.environ.update(rendezvous(os.environ))


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Torchrun's variables, worked out; empty where torchrun has set its own, and for a process on its own.

    Raises UserError for a TF_CONFIG that does not say who meets whom.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        return {}
    if environment.get("TF_CONFIG", "").strip():
        return _from_tf_config(environment["TF_CONFIG"])
    # Slurm says the number of tasks to the batch script as well, which is no task; this one only to a step's tasks.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environment)
    return {}


def _from_tf_config(text: str) -> dict[str, str]:
    """The chief is rank 0, where there is one; then the workers, in their order."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"TF_CONFIG: not JSON: {error}") from None
    cluster, task = _mapping(config, "TF_CONFIG").get("cluster"), config.get("task")
    if not cluster:
        return {}
    cluster, task = _mapping(cluster, "TF_CONFIG: cluster"), _mapping(task, "TF_CONFIG: task")
    kind, index = task.get("type"), task.get("index", 0)
    if kind in _NOT_TRAINED_ON:
        raise UserError(
            f"TF_CONFIG: genscale trains without {_NOT_TRAINED_ON[kind]}; start it on chief and workers only"
        )
    me = (kind, _whole(index))
    members: dict[tuple[Any, int | None], str] = {
        (name, position): address for name in _TRAINED_ON for position, address in enumerate(_addresses(cluster, name))
    }
    if me not in members:
        raise UserError(f"TF_CONFIG: task: no {kind!r} with index {index!r} in the cluster")
    rank = list(members).index(me)
    addresses = list(members.values())
    hosts = [address.rpartition(":")[0] for address in addresses]
    return _variables(
        address=hosts[0],
        port=addresses[0].rpartition(":")[2],
        rank=rank,
        size=len(members),
        local_rank=hosts[:rank].count(hosts[rank]),
    )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {value!r}")
    return value


def _addresses(cluster: dict[str, Any], name: str) -> list[str]:
    addresses = cluster.get(name) or []
    if not isinstance(addresses, list):
        raise UserError(f"TF_CONFIG: cluster: {name}: expected a list of addresses, found {addresses!r}")
    for address in addresses:
        if not isinstance(address, str) or not re.fullmatch(r".+:\d+", address):
            raise UserError(f"TF_CONFIG: cluster: expected addresses such as 'host:1234', found {address!r}")
    return addresses


def _whole(index: Any) -> int | None:
    """A task's index, which some clusters write as text."""
    return int(index) if str(index).isdecimal() else None


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """One process for each task; task 0 is on the first node."""
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    local_rank = int(environment.get("SLURM_LOCALID", "0"))
    for name in _VISIBLE_DEVICES:
        if visible := environment.get(name, ""):
            local_rank %= len(visible.split(","))  # a task that is bound to a device of its own sees that one only
    return _variables(
        # What is set stands: where the names of nodes lead nowhere, or a port is taken.
        address=environment.get("MASTER_ADDR") or first_host(nodes),
        port=environment.get("MASTER_PORT") or _slurm_port(job, step),
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=local_rank,
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: ``rack[07-09,12]-n[1,3],login`` begins with ``rack07-n1``."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if name is None:
        raise UserError(f"SLURM_NODELIST: expected names such as n[1-3,7], found {nodes!r}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name[0])


def _slurm_port(job: int, step: int) -> int:
    """The same on all tasks, another for jobs and steps near by, and below the range that kernels hand out."""
    return 10_000 + (job + 997 * step) % 20_000


def _variables(*, address: str, port: str | int, rank: int, size: int, local_rank: int) -> dict[str, str]:
    """Nothing for a lone process, which forms no group."""
    if size == 1:
        return {}
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
    }

"""The flight record: the last collectives of each rank, as torch keeps them, on the disk when a run hangs.

Torch's own ``torchfrtrace FOLDER`` compares the files of all ranks and says which collective did not match.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

_ENTRIES = "2000"


def record_flight(folder: Path) -> None:
    """To be called before the group is formed. What the environment sets already holds.

    Torch reads older names of the first two as well (``TORCH_NCCL_...``), and warns of them.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _ENTRIES)
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank-"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump_flight(folder: Path, rank: int) -> None:
    """Write this rank's record, ``rank-N``, if it can be had at all: it is never worth another failure."""
    with suppress(Exception):
        records = [pickle.loads(dump()) for dump in _recorders("trace")]
        record = max(records, key=lambda record: len(record.get("entries", ())))
        if "" in record["pg_config"]:  # gloo's groups have no names there (torch 2.13), which torchfrtrace needs
            record["pg_config"] = _groups()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}").write_bytes(pickle.dumps(record))


def collectives_entered() -> int:
    """How many collectives this rank has begun, in all groups; 0 where torch does not say. About 15 microseconds."""
    count = 0
    with suppress(Exception):
        for dump in _recorders("trace_json"):
            groups = json.loads(dump(includeCollectives=False, onlyActive=False))["pg_status"]
            count += sum(int(group["last_enqueued_collective"]) for group in groups.values())
    return count


def _recorders(what: str) -> list[Callable[..., bytes]]:
    """NCCL's groups have a recorder of their own, where torch is built with it."""
    names = (f"_dump_fr_{what}", f"_dump_nccl_{what}")
    return [getattr(_distributed_c10d, name) for name in names if hasattr(_distributed_c10d, name)]


def _groups() -> dict[str, dict[str, str]]:
    known = distributed_c10d._world
    return {
        known.pg_names[group]: {
            "name": known.pg_names[group],
            "desc": group.group_desc,
            "ranks": str(sorted(ranks)),
        }
        for group, ranks in known.pg_group_ranks.items()
    }

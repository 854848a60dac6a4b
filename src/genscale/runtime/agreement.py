"""The processes of a run agree, before they begin, on what they are about to do."""

from __future__ import annotations

import hashlib
import platform
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import distributed

from genscale.runtime.errors import UserError
from genscale.runtime.world import current_world

Describe = Callable[[str, str], str]
"""Says how a fact of the ranks at large and another one differ."""


def agree(facts: Mapping[str, str], describe: Mapping[str, Describe] | None = None) -> None:
    """Raise UserError, on all ranks and told by rank 0, where any of them has other facts than most.

    Args:
        facts: by name, as ``a recipe``: "rank 3 on host n2 has another recipe".
        describe: for some facts, what is shown of two that differ; by default both.
    """
    world = current_world()
    if world.size == 1:
        return
    digests = {name: hashlib.blake2b(fact.encode(), digest_size=8).hexdigest() for name, fact in facts.items()}
    all_digests: list[dict[str, str]] = [{}] * world.size
    distributed.all_gather_object(all_digests, digests)
    names = dict.fromkeys(name for each in all_digests for name in each)
    differing = [name for name in names if len({each.get(name) for each in all_digests}) > 1]
    if not differing:
        return
    whole: list[tuple[str, dict[str, str]]] = [("", {})] * world.size
    distributed.all_gather_object(
        whole, (socket.gethostname(), {name: facts.get(name, "nothing") for name in differing})
    )
    parts = [_difference(name, whole, (describe or {}).get(name, _both)) for name in differing]
    error = UserError(f"{'; '.join(parts)}; all ranks need the same")
    error.told = world.rank != 0
    raise error


def _difference(name: str, whole: list[tuple[str, dict[str, str]]], describe: Describe) -> str:
    """``rank 3 on host n2 has another recipe: training.batch: 64 samples -> 32 samples``."""
    values = [facts[name] for _, facts in whole]
    usual = Counter(values).most_common(1)[0][0]  # of as many, the one of the lowest rank
    others: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        if value != usual:
            others[value].append(rank)
    parts = []
    for value, ranks in others.items():
        hosts = sorted({whole[rank][0] for rank in ranks})
        who = f"rank {ranks[0]} on host {hosts[0]} has" if len(ranks) == 1 else f"{_listed(ranks, hosts)} have"
        parts.append(f"{who} another {name}: {describe(usual, value)}")
    return "; ".join(parts)


def _listed(ranks: list[int], hosts: list[str]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"ranks {shown} on {'host' if len(hosts) == 1 else 'hosts'} {', '.join(hosts[:4])}"


def _both(usual: str, other: str) -> str:
    return f"{usual} -> {other}"


def software() -> dict[str, str]:
    """What runs: a hash of genscale's source files, torch's version and Python's."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return {
        "genscale": f"source {digest.hexdigest()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }

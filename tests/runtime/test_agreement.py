"""Before they begin, the ranks make sure that they are about to do the same."""

from __future__ import annotations

import socket

import pytest
from ranks import Ranks, codes, lines

from genscale.runtime.agreement import agree, software

AGREE = """
import torch
from genscale.runtime.world import join_world
from genscale.runtime.agreement import agree
join_world(torch.device("cpu"))
"""
HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ("{'recipe': 'a', 'torch': '2.13'}", None),
        (
            "{'recipe': f'batch: {32 if rank == 3 else 64}', 'torch': '2.13'}",
            f"rank 3 on host {HOST} has another recipe: 'batch: 64' and 'batch: 32'",
        ),
        (
            "{'recipe': 'a', 'torch': '2.13' if rank % 3 else f'2.1{rank}'}",
            f"rank 0 on host {HOST} has another torch: 2.13 -> 2.10",
        ),
        (
            "{'recipe': 'a', 'torch': '2.12' if rank < 2 else '2.13'}",
            f"ranks 2, 3 on host {HOST} have another torch: 2.12 -> 2.13",
        ),
        (
            "{'recipe': 'a', **({'added': 'x'} if rank == 2 else {})}",
            f"rank 2 on host {HOST} has another added: nothing -> x",
        ),
    ],
    ids=["the same", "recipe", "torch", "two against two", "a fact of one"],
)
def test_ranks_that_differ_are_named_once_and_all_end(facts: str, expected: str | None) -> None:
    describe = "{'recipe': lambda usual, other: f'{usual!r} and {other!r}'}"
    ended = Ranks(f"{AGREE}agree({facts}, {describe})", 4).end()
    if expected is None:
        assert (codes(ended), lines(ended)) == ([0] * 4, [])
    else:
        assert codes(ended) == [2] * 4
        [line] = lines(ended)
        assert line == f"error: {expected}; all ranks need the same"
        assert ended[0].printed.strip() == line


def test_a_lone_process_agrees_with_itself() -> None:
    agree({"recipe": "a"})


def test_software_is_the_same_twice_and_names_the_source() -> None:
    assert software() == software()
    assert set(software()) == {"genscale", "torch", "Python"}
    assert software()["genscale"].startswith("source ")

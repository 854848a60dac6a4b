"""Processes find each other, or say in one line why not; what rank 0 does may take longer than a collective."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from ranks import Ranks, codes, lines

from genscale.runtime.errors import UserError
from genscale.runtime.joining import seat_from_environment, seconds_from

JOIN = """
import torch, time
from genscale.runtime.world import current_world, from_rank_0, join_world, store
world = join_world(torch.device("cpu"))
print("> joined", flush=True)
"""


def test_all_get_rank_0s_answer_which_may_take_longer_than_a_collective() -> None:
    program = """
answer = from_rank_0(lambda: time.sleep(3) or "ready")
other = store()
other.set(f"note/{rank}", answer)
assert other.get("note/1") == b"ready"
torch.distributed.barrier()
assert answer == "ready" and (world.rank, world.size) == (rank, 3)
"""
    ended = Ranks(JOIN + program, 3, {"GENSCALE_COLLECTIVE_SECONDS": "1.5"}).end()
    assert (codes(ended), lines(ended)) == ([0, 0, 0], [])


def test_a_rank_that_never_comes_is_named_by_one_of_the_others() -> None:
    begun = time.monotonic()
    ended = Ranks(JOIN, 4, {"GENSCALE_JOIN_SECONDS": "2"}, ranks=[0, 1, 3]).end()
    assert codes(ended) == [2, 2, 2]
    [line] = lines(ended)
    assert line.startswith("error: 3 of 4 processes have joined after 2 s: rank 2 is missing; ")
    assert "GENSCALE_JOIN_SECONDS" in line
    assert time.monotonic() - begun < 15


def test_without_rank_0_each_host_tells_once() -> None:
    ended = Ranks(JOIN, 3, {"GENSCALE_JOIN_SECONDS": "1"}, ranks=[1, 2]).end()
    assert codes(ended) == [2, 2]
    assert lines(ended) == []  # neither is its host's first: that would be rank 0
    ended = Ranks(
        JOIN.replace("import torch", "import os; os.environ['LOCAL_RANK'] = '0'; import torch"),
        3,
        {"GENSCALE_JOIN_SECONDS": "1"},
        ranks=[1],
    ).end()
    [line] = lines(ended)
    assert line.startswith(f"error: rank 1 on host {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:")
    assert "after 1 s (connection refused)" in line


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"MASTER_PORT": port, "GENSCALE_JOIN_SECONDS": "1"}
        ended = Ranks(JOIN, 2, variables, ranks=[0]).end()
    assert codes(ended) == [2]
    [line] = lines(ended)
    assert f"cannot listen at port {port}: Address already in use" in line
    assert "MASTER_PORT" in line


def test_two_processes_with_one_rank_are_told_apart() -> None:
    first = Ranks("print('> here', flush=True)" + JOIN, 3, {"GENSCALE_JOIN_SECONDS": "4"}, ranks=[0, 1])
    first.wait_until_printed("> here", 1)
    time.sleep(1)
    again = Ranks(JOIN, 3, {"MASTER_PORT": str(first.port)}, ranks=[1]).end()
    assert lines(again)[0].startswith(f"error: two processes call themselves rank 1 at 127.0.0.1:{first.port}: ")
    assert codes(first.end()) == [2, 2]


def test_ctrl_c_ends_the_waiting_for_others() -> None:
    ranks = Ranks("print('> here', flush=True)" + JOIN, 2, ranks=[0])
    ranks.wait_until_printed("> here", 0)
    time.sleep(0.5)
    ranks.signal(0, signal.SIGINT)
    assert codes(ranks.end(10)) == [130]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "4"}, r"RANK: 4 is not one of the 4 ranks that WORLD_SIZE makes: expected 0 to 3"),
        ({"RANK": "first"}, r"RANK: 'first' is no whole number"),
        ({"RANK": None}, r"RANK: not set, though WORLD_SIZE is"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT: 70000 is no port"),
        ({"MASTER_ADDR": None}, r"MASTER_ADDR: not set, though WORLD_SIZE is"),
        ({"WORLD_SIZE": "many"}, r"WORLD_SIZE: 'many' is no whole number"),
    ],
)
def test_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    right = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {**right, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        seat_from_environment()


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_limit_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GENSCALE_JOIN_SECONDS", text)
    with pytest.raises(UserError, match=f"GENSCALE_JOIN_SECONDS: '{text}' is no number of seconds above 0"):
        seconds_from("GENSCALE_JOIN_SECONDS", 300)

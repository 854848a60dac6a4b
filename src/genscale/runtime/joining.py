"""How the processes of a run find each other, and one clear line for each way in which they do not.

Rank 0 listens at ``MASTER_ADDR:MASTER_PORT`` and keeps a small key-value store there (under torchrun its agent does);
the others connect to it. Every process counts itself in and waits until all are there.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore

from genscale.runtime.errors import UserError

_STORE_SECONDS = 30.0
"""How long one question to the store may take."""
_LINGER_SECONDS = 3.0
"""How long the process that keeps the store stays after a failure, so that the others can read what it was."""


class Seat(NamedTuple):
    """What the launcher says of this process: torchrun's variables."""

    rank: int
    size: int
    host: str
    port: int
    agent_keeps_store: bool
    attempt: int
    """How often torchrun has started the processes anew: its store, and what stands in it, outlives them."""
    local_rank: int

    @property
    def keeps_store(self) -> bool:
        return self.rank == 0 and not self.agent_keeps_store

    def connect(self, seconds: float = _STORE_SECONDS) -> TCPStore:
        """A client of the store, with a connection of its own: one waits while another one is asked."""
        return TCPStore(self.host, self.port, None, False, timedelta(seconds=seconds), wait_for_workers=False)


class StoreGone(RuntimeError):
    """Rank 0, or torchrun's agent, has ended, and the store with it."""


class SharedStore:
    """The store's keys under a prefix, through a connection of this object's own, for one thread.

    torch's client prints a long C++ trace when its server has gone, so that this one looks first whether it is there.
    """

    def __init__(self, seat: Seat, prefix: str, client: TCPStore | None = None):
        self._client = PrefixStore(prefix, client or seat.connect())
        self._probe = socket.create_connection((seat.host, seat.port), timeout=_STORE_SECONDS)

    def set(self, key: str, value: str = "") -> None:
        self._there().set(key, value)

    def get(self, key: str) -> str:
        """Waits for the key."""
        return self._there().get(key).decode()

    def get_all(self, keys: list[str]) -> list[str]:
        """Waits for all of the keys."""
        return [value.decode() for value in self._there().multi_get(keys)]

    def has(self, *keys: str) -> bool:
        """Whether all of the keys are there."""
        return self._there().check(list(keys))

    def count(self, key: str, more: int) -> int:
        return self._there().add(key, more)

    def claim(self, key: str, value: str) -> str:
        """The value of the key, which is this one where no rank was faster."""
        return self._there().compare_set(key, "", value).decode()

    def _there(self) -> PrefixStore:
        # Nothing is ever sent here: what can be read is the end.
        if select.select([self._probe], [], [], 0)[0]:
            raise StoreGone("the store of the run is gone")
        return self._client


class Joined(NamedTuple):
    """A process that has found the others."""

    seat: Seat
    prefix: str
    client: TCPStore

    def store(self) -> SharedStore:
        """For a thread of its own: a client that waits for an answer lets no other thread ask."""
        return SharedStore(self.seat, f"{self.prefix}/shared")

    def groups_store(self) -> Store:
        """For torch's process groups."""
        return PrefixStore(f"{self.prefix}/groups", self.client)


def seconds_from(variable: str, default: float) -> float:
    """A number of seconds that the environment may set; raises UserError for anything else."""
    text = os.environ.get(variable)
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e7:
        raise UserError(f"{variable}: '{text}' is no number of seconds above 0")
    return seconds


def seat_from_environment() -> Seat:
    """Raises UserError for a variable that is missing or makes no sense."""
    size = _number("WORLD_SIZE")
    rank, port = _number("RANK"), _number("MASTER_PORT")
    if not 0 <= rank < size:
        raise UserError(f"RANK: {rank} is not one of the {size} ranks that WORLD_SIZE makes: expected 0 to {size - 1}")
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT: {port} is no port: expected 1 to 65535")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR: not set, though WORLD_SIZE is; expected the host of rank 0")
    return Seat(
        rank=rank,
        size=size,
        host=os.environ["MASTER_ADDR"],
        port=port,
        agent_keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number("TORCHELASTIC_RESTART_COUNT", "0"),
        local_rank=_number("LOCAL_RANK", "0"),
    )


def _number(variable: str, default: str | None = None) -> int:
    text = os.environ.get(variable, default)
    if text is None:
        raise UserError(f"{variable}: not set, though WORLD_SIZE is; a launcher such as torchrun sets both")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable}: '{text}' is no whole number") from None


def join(seat: Seat, seconds: float) -> Joined:
    """Open the store and wait for all processes, at most so many seconds; raises UserError that says who is missing."""
    deadline = time.monotonic() + seconds
    server = _listen(seat) if seat.keeps_store else _reach(seat, deadline, seconds)
    # Each start of torchrun's processes counts itself in anew; elsewhere the store is as young as they are.
    attempt = PrefixStore(f"genscale/attempt-{seat.attempt}", server)
    life = attempt.add(f"lives-of-rank-{seat.rank}", 1)
    if life > 1 and not seat.agent_keeps_store:
        raise UserError(
            f"two processes call themselves rank {seat.rank} at {seat.host}:{seat.port}: each needs a RANK of its own, "
            "and each run a MASTER_PORT of its own"
        )
    prefix = f"genscale/attempt-{seat.attempt}/life-{life}"
    _wait_for_all(seat, SharedStore(seat, f"{prefix}/joining", server), deadline, seconds)
    return Joined(seat, prefix, server)


def _listen(seat: Seat) -> TCPStore:
    """Keep the store. The socket is Python's, whose errors say what is wrong."""
    try:
        # Who is reached at an IPv4 address needs no IPv6; torch asks the name service for each mapped address.
        both = socket.has_dualstack_ipv6() and not re.fullmatch(r"[\d.]+", seat.host)
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", seat.port), family=family, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"rank 0 on host {socket.gethostname()} cannot listen at port {seat.port}: {error.strerror}; another run "
            "may be using it: set MASTER_PORT, or torchrun's --master-port, to a free one"
        ) from None
    return TCPStore(
        seat.host,
        seat.port,
        None,
        True,
        timedelta(seconds=_STORE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _reach(seat: Seat, deadline: float, seconds: float) -> TCPStore:
    """Connect, as soon as somebody listens. Until then a plain socket tries, which complains to nobody."""
    while True:
        try:
            socket.create_connection((seat.host, seat.port), timeout=2.0).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                reason = (error.strerror or str(error)).lower()
                raise _told_once_a_host(
                    seat,
                    f"rank {seat.rank} on host {socket.gethostname()} cannot reach rank 0 at {seat.host}:{seat.port} "
                    f"after {seconds:g} s ({reason}): see that rank 0 runs, that MASTER_ADDR names its host, and that "
                    "the port is open between the hosts",
                ) from None
        time.sleep(0.2)
    try:
        return seat.connect()
    except RuntimeError:
        raise _told_once_a_host(
            seat,
            f"what answers at {seat.host}:{seat.port} is not rank 0 of this run: another program may be using the "
            "port; set MASTER_PORT to a free one",
        ) from None


def _told_once_a_host(seat: Seat, message: str) -> UserError:
    """For what ranks cannot agree on who tells, as they do not reach each other."""
    error = UserError(message)
    error.told = seat.local_rank != 0
    return error


def _wait_for_all(seat: Seat, store: SharedStore, deadline: float, seconds: float) -> None:
    pause = 0.005
    try:
        store.set(f"joined/{seat.rank}")
        arrived = store.count("arrived", 1)
        while not store.has("verdict"):
            if arrived == seat.size:
                return
            if time.monotonic() > deadline:
                # The first one whose time is up decides, so that all end with the same.
                missing = [rank for rank in range(seat.size) if not store.has(f"joined/{rank}")]
                if missing:
                    store.claim("verdict", f"{seat.rank} {_missing(missing, seat, seconds)}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)
            arrived = store.count("arrived", 0)
        teller, _, message = store.get("verdict").partition(" ")
        store.count("read", 1)
        until = time.monotonic() + _LINGER_SECONDS
        while seat.keeps_store and store.count("read", 0) < arrived and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:
        message = f"rank 0 at {seat.host}:{seat.port} ended before all {seat.size} processes had joined"
        raise _told_once_a_host(seat, message) from None
    error = UserError(message)
    error.told = int(teller) != seat.rank
    raise error


def _missing(missing: list[int], seat: Seat, seconds: float) -> str:
    shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    are = "rank {} is" if len(missing) == 1 else "ranks {} are"
    return (
        f"{seat.size - len(missing)} of {seat.size} processes have joined after {seconds:g} s: {are.format(shown)} "
        f"missing; look at what they printed, and that they reach {seat.host}:{seat.port} "
        "(GENSCALE_JOIN_SECONDS sets how long to wait)"
    )

"""Slow ranks are named: all wait for the slowest, and none sees by itself which it is."""

from __future__ import annotations

import socket
from collections import deque
from statistics import median

import torch
from torch import distributed

from genscale.runtime.world import World


class StragglerWatch:
    """Compares how long the ranks are busy in a step.

    Args:
        world: this process's place.
        window: steps that are looked at.
        threshold: how many times the median of all ranks counts as slow.
    """

    def __init__(self, world: World, window: int = 20, threshold: float = 1.3):
        self._world, self._window, self._threshold = world, window, threshold
        self._busy: deque[float] = deque(maxlen=window)
        self._known: set[int] = set()
        self._hosts: list[str] = []

    def observe(self, busy_seconds: float) -> None:
        """Take note of a step: the seconds that this rank computed, without its waiting for the others."""
        self._busy.append(busy_seconds)

    def slow_ranks(self) -> list[str]:
        """A line for each rank that has become slow; nothing new of one that stays so. Asked on all ranks at once."""
        if self._world.size == 1:
            return []
        mine = median(self._busy) if len(self._busy) == self._window else 0.0
        each = [torch.zeros(1) for _ in range(self._world.size)]
        distributed.all_gather(each, torch.tensor([mine]))
        seconds = torch.cat(each)
        usual = seconds.median().item()
        if not usual or not seconds.min():
            return []
        slow = {rank for rank, busy in enumerate(seconds.tolist()) if busy > self._threshold * usual}
        new, self._known = sorted(slow - self._known), slow
        if new and not self._hosts:  # all ranks see the same numbers, so that all of them come here
            hosts: list[str] = [""] * self._world.size
            distributed.all_gather_object(hosts, socket.gethostname())
            self._hosts = hosts
        return [
            f"rank {rank} on host {self._hosts[rank]} is slow: {seconds[rank] / usual:.1f} times the median of the "
            f"ranks over the last {self._window} steps"
            for rank in new
        ]

"""Running out of memory is one line with what would fit, and on one rank it ends all."""

from __future__ import annotations

import time

import pytest
import torch
from ranks import Ranks, codes, lines

from genscale.runtime.errors import UserError
from genscale.runtime.memory import explained_memory, is_out_of_memory

CPU = torch.device("cpu")


def too_much() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def test_the_line_says_where_how_much_and_what_would_fit() -> None:
    with (
        pytest.raises(UserError) as caught,
        explained_memory(CPU, lambda: "step 14, backward", lambda: "layout.micro_batch: 8 -> 4"),
    ):
        too_much()
    line = str(caught.value)
    assert line.startswith("ran out of memory on cpu in step 14, backward: 1125899.9 GB more were asked for, ")
    assert line.endswith(" were free; to make it fit: layout.micro_batch: 8 -> 4")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("memory"), False),
    ],
)
def test_only_running_out_of_memory_is_explained(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with (
        pytest.raises(UserError if expected else type(error)),
        explained_memory(CPU, lambda: "step 1", lambda: "a smaller model"),
    ):
        raise error


def test_an_accelerators_own_words_give_the_amount() -> None:
    with (
        pytest.raises(UserError, match=r"2\.50 GiB more were asked for"),
        explained_memory(CPU, lambda: "step 1", lambda: "a smaller model"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of")


def test_one_rank_without_memory_ends_all() -> None:
    program = """
import torch
from genscale.runtime.memory import explained_memory
from genscale.runtime.watch import watching
from genscale.runtime.world import join_world
join_world(torch.device("cpu"))
advice = "layout.micro_batch: 8 -> 4"
with watching() as watch, explained_memory(torch.device("cpu"), lambda: watch.place, lambda: advice):
    watch.at(13, "backward")
    torch.empty((1 << 50) if rank == 1 else 1, dtype=torch.uint8)
    watch.at(13, "gradients", together=True)
    torch.distributed.all_reduce(torch.ones(1))
"""
    begun = time.monotonic()
    ended = Ranks(program, 4).end()
    assert codes(ended) == [2] * 4
    [line] = lines(ended)
    assert line.startswith("error: rank 1 ran out of memory on cpu in step 14, backward: ")
    assert line.endswith("to make it fit: layout.micro_batch: 8 -> 4")
    assert time.monotonic() - begun < 10

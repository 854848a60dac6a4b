"""Attention over a sequence split over two ranks, forward and backward, against one process on the whole.

    python benchmarks/context_attention.py

Each rank has one thread, and the processes talk by gloo. The contenders take turns, ``--repeats`` times, and the table
shows medians of milliseconds; a round of ranks lasts as long as the slower one. Where a machine has two cores, two
ranks can at best match one process with two threads. ``--processor-time`` counts what the processor worked for the
busier rank instead, without waiting: for machines that others use at the same time. (Two threads' times add up.)
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

BATCH, HEADS, KEY_VALUE_HEADS, WIDTH = 1, 8, 8, 64
METHODS = ("ring", "all_gather")


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS, HEADS)
    return [torch.randn(BATCH, n, tokens, WIDTH, generator=draws).to(dtype) for n in heads]


clock = time.perf_counter


def milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], x: list[Tensor]) -> float:
    q, k, v = (part.requires_grad_() for part in x[:3])
    start = clock()
    torch.autograd.grad(attend(q, k, v), (q, k, v), x[3])
    return 1000 * (clock() - start)


def alone(threads: int, tokens: int, dtype: torch.dtype, causal: bool) -> float:
    from genscale.models.attention import attend
    from genscale.models.mask import AttentionMask

    torch.set_num_threads(threads)
    mask = AttentionMask(tokens, tokens, causal)
    return milliseconds(lambda q, k, v: attend(q, k, v, mask, WIDTH**-0.5), inputs(tokens, dtype))


def on_rank(method: Any, tokens: int, dtype: torch.dtype, causal: bool) -> float:
    from genscale.models.mask import AttentionMask
    from genscale.parallel.context import Portions, context_attend

    group = distributed.group.WORLD
    assert group is not None
    portions = Portions(tokens, distributed.get_world_size(), distributed.get_rank())
    mask = AttentionMask(tokens, tokens, causal)
    x = [portions.take(part, 2) for part in inputs(tokens, dtype)]
    distributed.barrier()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return context_attend(q, k, v, mask, WIDTH**-0.5, portions=portions, group=group, method=method)

    return milliseconds(attend, x)


def work(port: int, rank: int, processor_time: bool) -> None:
    """A rank; single processes are measured by rank 0 alone."""
    global clock
    clock = time.process_time if processor_time else time.perf_counter
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for line in sys.stdin:
        contender, tokens, dtype, causal = json.loads(line)
        size = (tokens, getattr(torch, dtype), causal)
        torch.set_num_threads(1)
        if contender in METHODS:
            slowest = torch.tensor(on_rank(contender, *size))
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            print(slowest.item(), flush=True)
        else:
            print(alone(int(contender), *size) if rank == 0 else 0, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return work(options.port, options.rank, options.processor_time)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, "--port", str(port)]
    command += ["--processor-time"] * options.processor_time
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, "--rank", str(rank)], **pipes) for rank in range(2)]

    def measure(*task: object) -> float:
        for rank in ranks:
            print(json.dumps(task), file=rank.stdin, flush=True)
        return max(float(rank.stdout.readline()) for rank in ranks)

    names = {"1": "1 process, 1 thread", "2": "1 process, 2 threads"} | {m: f"2 ranks, {m}" for m in METHODS}
    print("| tokens | dtype | " + " | ".join(names.values()) + " |")
    print("|---" * (2 + len(names)) + "|")
    for tokens in options.tokens:
        for dtype in options.dtypes:
            task = (tokens, dtype, not options.bidirectional)
            for name in names:
                measure(name, *task)
            rounds = [[measure(name, *task) for name in names] for _ in range(options.repeats)]
            medians = [f"{statistics.median(times):.0f}" for times in zip(*rounds, strict=True)]
            print(f"| {tokens} | {dtype} | " + " | ".join(medians) + " |", flush=True)
    for rank in ranks:
        rank.stdin.close()
        rank.wait()


if __name__ == "__main__":
    main()

"""Training speed and memory by layout: genscale, plain torch, Hugging Face Trainer (accelerate) and Lightning.

    python benchmarks/parallel.py --text tinyshakespeare.txt --peers-python /work/peers/bin/python

On two gloo processes with one thread each, against one process with one thread and with two. Where there is a GPU,
models of GPT-2's sizes on all GPUs instead, with utilisation and the time of kernels by category.

Contenders take turns, ``--repeats`` times; the tables show medians and, because machines are shared and noisy, medians
of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CONTENDERS = Path(__file__).with_name("contenders")
BASE = "1 process, 2 threads"


class Contender(NamedTuple):
    """A program, and how it is started."""

    layout: str
    who: str
    script: str
    how: str
    """What its script is told to do with the ranks."""
    processes: int = 2
    threads: int = 1
    options: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.who.startswith("genscale")


def ours(layout: str, processes: int = 2, threads: int = 1, **settings: Any) -> Contender:
    return Contender(layout, "genscale", "parallel_genscale.py", json.dumps(settings), processes, threads)


ON_CPU = [
    ours("1 process, 1 thread", processes=1),
    ours(BASE, processes=1, threads=2),
    Contender(BASE, "torch loop", "parallel_torch.py", "alone", 1, 2),
    ours("replicate=2", replicate=2),
    Contender("replicate=2", "torch loop, DistributedDataParallel", "parallel_torch.py", "replicate"),
    Contender("replicate=2", "Hugging Face Trainer, DDP", "parallel_huggingface.py", "replicate"),
    Contender("replicate=2", "Lightning, ddp", "parallel_lightning.py", "replicate"),
    ours("shard=2", shard=2),
    Contender("shard=2", "torch loop, fully_shard", "parallel_torch.py", "shard"),
    Contender("shard=2", "Hugging Face Trainer, FSDP2", "parallel_huggingface.py", "shard"),
    Contender("shard=2", "Lightning, FSDP2", "parallel_lightning.py", "shard"),
    Contender("shard=2", "Lightning, fsdp", "parallel_lightning.py", "fsdp"),
    ours("tensor=2", tensor=2),
    ours("tensor=2 sequence=false", tensor=2, sequence=False),
    ours("pipeline=2, 1f1b", pipeline=2),
    ours("pipeline=2, zero_bubble", pipeline=2, schedule="zero_bubble"),
    ours("context=2, ring", context=2),
    ours("context=2, all_gather", context=2, attention="all_gather"),
]


def prepare_store(text: str, vocabulary: int, folder: Path) -> None:
    """The store that genscale reads, and the same training tokens as one array for the others."""
    from genscale.data.prepare import prepare
    from genscale.recipe.load import recipe_from_mapping

    small = vocabulary < 257
    tokenizer: dict[str, Any] = {"kind": "characters", "end_of_document": False}
    data = {
        "sources": [text],
        "store": str(folder / "store"),
        "tokenizer": tokenizer if small else {"kind": "bpe", "vocabulary": vocabulary},
        "split": {"by": "tail", "validation": 0.1} if small else {"by": "document", "validation": 0.02},
    }
    store = prepare(recipe_from_mapping({"data": data}))
    (folder / "data.json").write_text(json.dumps({key: data[key] for key in ("store", "tokenizer", "split")}))
    np.save(folder / "train.npy", np.concatenate(store.shards("train")))


def run_once(contender: Contender, python: str, *words: object) -> dict[str, Any]:
    """The figures of all its ranks together.

    Raises:
        RuntimeError: it failed; with the last of what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, str(CONTENDERS / contender.script), *map(str, words), contender.how, *contender.options]
    ranks = []
    with tempfile.TemporaryDirectory() as name:
        for rank in range(contender.processes):
            environment = os.environ | {
                "BENCHMARK_STARTED": str(time.time()),
                "OMP_NUM_THREADS": str(contender.threads),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            if contender.processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(contender.processes),
                    "LOCAL_WORLD_SIZE": str(contender.processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            out, err = Path(name, f"{rank}.out"), Path(name, f"{rank}.err")
            with out.open("w") as stdout, err.open("w") as stderr:
                process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            ranks.append((process, out, err))
        try:
            wait([process for process, _, _ in ranks])
            failed = [err for process, _, err in ranks if process.returncode]
            if failed:
                raise RuntimeError(max((err.read_text()[-2000:].strip() for err in failed), key=len))
            return together([json.loads(out.read_text().strip().splitlines()[-1]) for _, out, _ in ranks])
        finally:
            for process, _, _ in ranks:
                process.kill()


def wait(processes: list[subprocess.Popen[bytes]], grace: float = 20.0) -> None:
    """Until all have ended, or one has failed and the others have had their time to notice."""
    until = None
    while any(process.poll() is None for process in processes) and (until is None or time.monotonic() < until):
        if until is None and any(process.returncode for process in processes):
            until = time.monotonic() + grace
        time.sleep(0.05)


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One dictionary from that of each rank: they wait for each other, their CPU time adds up."""
    first, *_ = ranks
    per_second = min(rank["per_second"] for rank in ranks)
    per_cpu_second = 1 / sum(1 / rank["per_cpu_second"] for rank in ranks)
    return first | {
        "per_second": per_second,
        "per_cpu_second": per_cpu_second,
        "cores": per_second / per_cpu_second,  # fewer than it has threads: it waited, or others had them
        "peak_memory_mb": max(rank["peak_memory_mb"] for rank in ranks),
    }


class Rounds:
    """What the contenders came to, round by round; of a contender that failed nothing but why."""

    def __init__(self, contenders: list[Contender]):
        self.figures: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in contenders}
        self.failed: dict[Contender, str] = {}
        self.loads: list[float] = []

    def run(self, repeats: int, measure: Callable[[Contender], dict[str, Any]]) -> None:
        """All rounds; after Ctrl-C those contenders that had their turn."""
        for number in range(repeats):
            for contender, figures in self.figures.items():
                if contender in self.failed:
                    continue
                self.loads.append(os.getloadavg()[0])
                try:
                    figures.append(measure(contender) | {"load": self.loads[-1]})
                    told = ", ".join(f"{key} {figures[-1][key]:,.0f}" for key in ("per_second", "per_cpu_second"))
                except RuntimeError as error:
                    self.failed[contender] = str(error)
                    told = f"failed: {error}"
                except KeyboardInterrupt:
                    return
                print(f"round {number + 1}: {contender.layout}, {contender.who}: {told}", file=sys.stderr)

    def median(self, contender: Contender, key: str) -> float:
        return statistics.median(each[key] for each in self.figures[contender])

    def ratio(self, one: Contender, other: Contender, key: str = "per_second") -> float | None:
        """The median of one's figure to the other's within a round; None where one of them failed or took no part."""
        pairs = zip(self.figures.get(one, ()), self.figures.get(other, ()), strict=False)
        ratios = [mine[key] / theirs[key] for mine, theirs in pairs]
        return statistics.median(ratios) if ratios else None

    def find(self, layout: str) -> Contender | None:
        """genscale in a layout."""
        return next((each for each in self.figures if each.layout == layout and each.ours), None)


def shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def print_cpu_table(rounds: Rounds, title: str) -> None:
    base = rounds.find(BASE)
    columns = (
        "",
        "tokens/s",
        f"to {BASE}",
        "genscale to it",
        "per CPU-second",
        "genscale to it",
        "memory of a rank, MB",
    )
    print(f"| {title} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for contender in rounds.figures:
        start = f"| {contender.layout} | {contender.who} |"
        if contender in rounds.failed:
            print(start, f"does not run: {rounds.failed[contender].splitlines()[-1][:120]} | | | | | | |")
            continue
        if not rounds.figures[contender]:
            continue
        of_layout = None if contender.ours else rounds.find(contender.layout)
        cells = [
            f"{rounds.median(contender, 'per_second'):,.0f}",
            shown(base and rounds.ratio(contender, base)),
            shown(of_layout and rounds.ratio(of_layout, contender)),
            f"{rounds.median(contender, 'per_cpu_second'):,.0f}",
            shown(of_layout and rounds.ratio(of_layout, contender, "per_cpu_second")),
            f"{rounds.median(contender, 'cores'):.2f}",
            f"{rounds.median(contender, 'peak_memory_mb'):,.0f}",
        ]
        print(start, " | ".join(cells), "|")
    least, most = min(rounds.loads), max(rounds.loads)
    done = max(map(len, rounds.figures.values()))
    print(f"\n{done} rounds; load of the machine while they ran: {least:.1f} to {most:.1f} on {os.cpu_count()} cores.")


def goals(rounds: Rounds) -> Iterator[tuple[str, float, float]]:
    """(goal, ratio that was found, ratio that is wanted)."""
    base, copies, shards = (rounds.find(layout) for layout in (BASE, "replicate=2", "shard=2"))
    wanted = [
        (f"replicate=2 at least 0.9 of {BASE}", copies, base, 0.9),
        ("shard=2 within 10 % of replicate=2", shards, copies, 0.9),
    ]
    wanted += [
        (f"{peer.layout}: not slower than {peer.who}", rounds.find(peer.layout), peer, 1.0)
        for peer in rounds.figures
        if not peer.ours
    ]
    for goal, one, other, least in wanted:
        found = one and other and rounds.ratio(one, other)
        if found:
            yield goal, found, least


def print_goals(rounds: Rounds) -> None:
    print("\n| goal | found | wanted | |\n|---|---|---|---|")
    for goal, found, least in goals(rounds):
        print(f"| {goal} | {found:.2f} | {least:.2f} | {'met' if found >= least else 'not met'} |")


def measure_gpus(options: argparse.Namespace, gpus: int) -> None:
    """The table for accelerators: speed, utilisation of the known peak, and where the kernels' time goes.

    *Not run here*: written on machines without a GPU; only its counting by category was tried, on a CPU.
    """
    import importlib.util

    sys.path.insert(0, str(CONTENDERS))
    from kernels import CATEGORIES
    from ranks import SHAPES

    how = {"replicate": gpus} if gpus == 1 else {"shard": gpus}
    way = "alone" if gpus == 1 else "shard"
    precisions = ["bf16"] + ["fp8"] * bool(importlib.util.find_spec("torchao"))
    columns = ("precision", "", "tokens/s", "genscale to it", "utilisation", "memory of a rank, MB", *CATEGORIES)
    print(
        f"| {gpus} GPU{'s' * (gpus > 1)}, {'='.join(map(str, *how.items()))}; kernels in ms a step | "
        + " | ".join(columns)
        + " |"
    )
    print("|---" * (len(columns) + 1) + "|")
    for shape in options.gpu_shapes:
        settings = SHAPES[shape]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare_store(options.text, settings.vocabulary, folder)
            for precision in precisions:
                contenders = [
                    Contender(
                        shape, "genscale", "parallel_genscale.py", json.dumps(how), gpus, 8, ("compile", "profile")
                    )
                ]
                if precision == "bf16":
                    contenders.append(
                        Contender(shape, "torch loop", "parallel_torch.py", way, gpus, 8, ("compile", "profile"))
                    )
                rounds = Rounds(contenders)
                rounds.run(options.repeats, measurer(options, shape, precision, folder))
                for contender in contenders:
                    print(gpu_row(rounds, contender, contenders[0], settings.context, precision, gpus, CATEGORIES))


def gpu_row(
    rounds: Rounds,
    contender: Contender,
    first: Contender,
    context: int,
    precision: str,
    gpus: int,
    categories: tuple[str, ...],
) -> str:
    start = f"| {contender.layout} | {precision} | {contender.who} |"
    if contender in rounds.failed:
        return f"{start} does not run: {rounds.failed[contender].splitlines()[-1][:120]} |" + " |" * (
            3 + len(categories)
        )
    per_second = rounds.median(contender, "per_second")
    counted = rounds.figures[first][-1] if rounds.figures[first] else None  # genscale counts the model's work
    used = per_second / context * counted["flops"] / gpus / counted["peak"] if counted else None
    spent = rounds.figures[contender][-1]["milliseconds"]
    whole = sum(spent.values())
    cells = [
        f"{per_second:,.0f}",
        "" if contender is first else shown(rounds.ratio(first, contender)),
        "" if used is None else f"{used:.0%}",
        f"{rounds.median(contender, 'peak_memory_mb'):,.0f}",
        *(f"{spent[kind]:.1f} ({spent[kind] / whole:.0%})" for kind in categories),
    ]
    return f"{start} " + " | ".join(cells) + " |"


def measurer(
    options: argparse.Namespace, shape: str, precision: str, folder: Path
) -> Callable[[Contender], dict[str, Any]]:
    def measure(contender: Contender) -> dict[str, Any]:
        shutil.rmtree(folder / "run", ignore_errors=True)
        python = sys.executable if contender.ours else options.peers_python
        return run_once(contender, python, shape, folder, precision, options.steps)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python:stdlib", help="any source; on the CPU a text of 65 characters")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="on the CPU")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", help="words: contenders in whose layout or name one of them stands")
    parser.add_argument("--profile", action="store_true", help="on the CPU: genscale's and torch's time by category")
    parser.add_argument("--gpu-shapes", nargs="*", default=["gpt-124m", "gpt-350m", "gpt-1.3b"])
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()

    import torch

    if torch.cuda.is_available():
        measure_gpus(options, torch.cuda.device_count())
        return
    contenders = [
        each._replace(options=("profile",) if options.profile else ())
        for each in ON_CPU
        if not options.only or any(word in f"{each.layout} {each.who}" for word in options.only)
    ]
    rounds = Rounds(contenders)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_store(options.text, 65, folder)
        rounds.run(options.repeats, measurer(options, "char-10m", options.precision, folder))
    if options.json:
        kept = [each._asdict() | {"rounds": rounds.figures[each]} for each in contenders]
        Path(options.json).write_text(json.dumps(kept))
    print_cpu_table(rounds, f"6 x 384, context 256, batch 12, vocabulary 65, {options.precision}")
    print_goals(rounds)
    if options.profile:
        print_categories(rounds)


def print_categories(rounds: Rounds) -> None:
    """Milliseconds of the first rank in a step, by category, of the contenders that measured them."""
    measured = {
        each: rounds.figures[each][-1]["milliseconds"]
        for each in rounds.figures
        if each not in rounds.failed and "milliseconds" in rounds.figures[each][-1]
    }
    kinds = list(next(iter(measured.values()), {}))
    print("\n| ms a step | | " + " | ".join(kinds) + " |\n|---|---" + "|---" * len(kinds) + "|")
    for each, spent in measured.items():
        print(f"| {each.layout} | {each.who} | " + " | ".join(f"{spent[kind]:.0f}" for kind in kinds) + " |")


if __name__ == "__main__":
    main()

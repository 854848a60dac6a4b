"""Reading speed of the stream alone: random windows of a memory-mapped store into batches of 16 x 1024 tokens.

    python benchmarks/stream.py --peers-python /work/peers/bin/python

Each reader is a process of its own with one thread. They take turns, ``--repeats`` times; the table shows medians and,
because machines are shared and noisy, the median ratio to genscale in the same round. ``numpy`` readers read what they
find at random places; genscale also shuffles by epochs, counts samples and marks documents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

BATCH, CONTEXT = 16, 1024
WARM_UP = 0.5  # seconds
DOCUMENT = 1000  # mean tokens


def write_tokens(folder: Path, tokens: int) -> None:
    """``tokens.npy``, uint16 with frequent and rare ones, and ``documents.npy``, where documents start."""
    generator = np.random.default_rng(0)
    np.save(folder / "tokens.npy", np.minimum(generator.zipf(1.2, tokens), 65_535).astype(np.uint16))
    starts = np.sort(generator.choice(tokens - 1, tokens // DOCUMENT - 1, replace=False)) + 1
    np.save(folder / "documents.npy", np.concatenate([[0], starts]))


def genscale(folder: Path, shards: int = 1) -> Iterator[Any]:
    from genscale.data.stream import Stream

    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    store: Any = SimpleNamespace(  # what the stream reads of a store
        path=folder,
        tokens=lambda split: len(tokens),
        shards=lambda split: np.array_split(tokens, shards),
        document_starts=lambda split: np.load(folder / "documents.npy", mmap_mode="r"),
    )
    stream = Stream([store], None, "train", CONTEXT, seed=0)
    step = 0
    while True:
        yield stream.batch_at(step, BATCH)
        step += 1


def genscale_ten_shards(folder: Path) -> Iterator[Any]:
    return genscale(folder, shards=10)


def numpy_tokens(folder: Path) -> Iterator[Any]:
    """Every token picked by its place: the usual vectorised form."""
    import torch

    tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r"))
    generator, window = np.random.default_rng(0), np.arange(CONTEXT + 1)
    while True:
        starts = generator.integers(0, len(tokens) - CONTEXT, BATCH)
        yield torch.from_numpy(tokens[starts[:, None] + window].astype(np.int64))


def numpy_windows(folder: Path) -> Iterator[Any]:
    """Whole windows copied through a strided view: the least that numpy can do."""
    import torch

    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), CONTEXT + 1)
    generator = np.random.default_rng(0)
    while True:
        yield torch.from_numpy(windows[generator.integers(0, len(windows), BATCH)].astype(np.int64))


def nanogpt(folder: Path) -> Iterator[Any]:
    """``get_batch`` of nanoGPT's train.py."""
    import torch

    while True:
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")  # opened for each batch, as there
        places = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        x = torch.stack([torch.from_numpy(tokens[i : i + CONTEXT].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in places])
        yield x, y


def torchdata(folder: Path) -> Iterable[Any]:
    from torch.utils.data import RandomSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r"))

    class Windows:
        def __len__(self) -> int:
            return (len(tokens) - 1) // CONTEXT

        def __getitem__(self, index: int) -> np.ndarray:
            return tokens[index * CONTEXT : index * CONTEXT + CONTEXT + 1].astype(np.int64)

    windows: Any = Windows()
    sampler = RandomSampler(windows)
    return forever(lambda: StatefulDataLoader(windows, batch_size=BATCH, sampler=sampler, drop_last=True))


def litdata(folder: Path) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming.cache import Cache

    written = folder / "litdata"
    if not written.exists():
        import torch

        cache = Cache(str(written), chunk_bytes="64MB", item_loader=TokensLoader(block_size=CONTEXT + 1))
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        piece = 1000 * (CONTEXT + 1)
        for number, start in enumerate(range(0, len(tokens) - piece, piece)):
            cache[number] = torch.from_numpy(tokens[start : start + piece].astype(np.int32))
        cache.done()
        cache.merge()
    loader = TokensLoader(block_size=CONTEXT + 1)
    data = StreamingDataset(str(written), item_loader=loader, shuffle=True, drop_last=True)
    return forever(lambda: StreamingDataLoader(data, batch_size=BATCH, num_workers=0))


def mosaicml(folder: Path) -> Iterable[Any]:
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    written = folder / "mosaicml"
    if not written.exists():
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        with MDSWriter(out=str(written), columns={"tokens": "ndarray:uint16"}) as writer:
            for start in range(0, len(tokens) - CONTEXT, CONTEXT):
                writer.write({"tokens": np.array(tokens[start : start + CONTEXT + 1])})
    data: Any = StreamingDataset(local=str(written), shuffle=True, batch_size=BATCH)
    return forever(lambda: DataLoader(data, batch_size=BATCH, num_workers=0))


def forever(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()


OURS = {
    "genscale": genscale,
    "genscale, ten shards": genscale_ten_shards,
    "numpy, window rows": numpy_windows,
    "numpy, token by token": numpy_tokens,
    "nanoGPT's loop": nanogpt,
}
PEERS = {"torchdata": torchdata, "litdata": litdata, "mosaicml-streaming": mosaicml}


def measure(reader: str, folder: Path, seconds: float) -> dict[str, float]:
    """Tokens for each second of wall and of CPU time; the first batches are not counted."""
    import torch

    torch.set_num_threads(1)
    batches = iter((OURS | PEERS)[reader](folder))
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        next(batches)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        for _ in range(10):
            next(batches)
        count += 10
    tokens = count * BATCH * CONTEXT
    return {"wall": tokens / (time.perf_counter() - wall), "cpu": tokens / (time.process_time() - cpu)}


def run_once(python: str, reader: str, folder: Path, seconds: float) -> dict[str, float] | str:
    """One reader's figures in a process of its own, or the reason why it cannot run here."""
    command = [python, __file__, "--reader", reader, "--folder", str(folder), "--seconds", str(seconds)]
    quiet = {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--seconds", type=float, default=2.0, help="measured in each turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers-python", default="/work/peers/bin/python")
    parser.add_argument("--only", nargs="*", choices=[*OURS, *PEERS], help="readers; by default all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        print(json.dumps(measure(options.reader, options.folder, options.seconds)))
        return
    readers = {**dict.fromkeys(OURS, sys.executable), **dict.fromkeys(PEERS, options.peers_python)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.only or readers}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder, options.tokens)
        for number in range(options.repeats):
            for reader, figures in rounds.items():
                if reader in absent:
                    continue
                print(f"round {number + 1}: {reader}", file=sys.stderr)
                found = run_once(readers[reader], reader, folder, options.seconds)
                if isinstance(found, str):
                    absent[reader] = found
                else:
                    figures.append(found)
    if options.json:
        print(json.dumps({"rounds": rounds, "absent": absent}))
        return
    print("| reader | million tokens/s | per CPU-second | genscale to it, per CPU-second |")
    print("|---|---|---|---|")
    for reader, figures in rounds.items():
        if reader in absent:
            print(f"| {reader} | not run here: {absent[reader]} | | |")
            continue
        wall, cpu = (statistics.median(each[kind] for each in figures) / 1e6 for kind in ("wall", "cpu"))
        pairs = zip(rounds.get("genscale", figures), figures, strict=True)
        ratio = statistics.median(ours["cpu"] / each["cpu"] for ours, each in pairs)
        print(f"| {reader} | {wall:,.0f} | {cpu:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

"""What training over a slow network costs in loss and saves in bytes: DiLoCo against data parallelism, same tokens.

    OMP_NUM_THREADS=1 python benchmarks/low_communication.py --folder /tmp/slow

Each candidate trains the demo's language model from the command line, on two processes that talk over gloo. Bytes are
what one process sends: those of one measured step times the steps, and those of the exchanges between groups.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from genscale.runs.run import Run

DATA_PARALLEL = "data parallel"
CANDIDATES: dict[str, tuple[str, ...]] = {
    DATA_PARALLEL: (),
    "bfloat16 gradients": ("layout.compression=bf16",),
    "PowerSGD, rank 4": ("layout.compression=powersgd", "layout.compression_rank=4"),
    "every 50 steps": ("training.low_communication={every: 50}",),
    "every 15 steps, 8 bits": (
        "training.low_communication={every: 15, bits: 8, outer_learning_rate: 1.0, outer_momentum: 0.3}",
    ),
    "every 15 steps, 8 bits, plain mean": (
        "training.low_communication={every: 15, bits: 8, outer_learning_rate: 1.0, outer_momentum: 0.0}",
    ),
    "every 8 steps, 4 bits": (
        "training.low_communication={every: 8, bits: 4, outer_learning_rate: 1.0, outer_momentum: 0.3}",
    ),
    "every 8 steps, 4 bits, 3 fragments, 2 steps late": (
        "training.low_communication={every: 8, bits: 4, outer_learning_rate: 1.0, outer_momentum: 0.3, "
        "fragments: 3, overlap: 2}",
    ),
}
"""The overrides of the recipe."""


def train(overrides: tuple[str, ...], run: Path, store: Path, processes: int) -> Run:
    """By the command line, as a user would."""
    where = [f"run={run}", f"data.store={store}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "genscale", "train", "demo", *where, *overrides, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "1", **os.environ})
    return Run.open(run)


def measured(run: Run) -> dict[str, Any]:
    """The best validation loss, and what a process sent."""
    facts = run.facts
    exchanged = facts.get("low_communication", {}).get("bytes_sent", 0)
    return {
        "loss": facts["best"]["loss"],
        "megabytes": (facts["traffic"]["bytes"] * facts["step"] + exchanged) / 1e6,
        "seconds": facts["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for runs and the store; finished runs are kept")
    parser.add_argument("--set", nargs="+", default=[], help="overrides for all, such as training.budget='400k tokens'")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="besides data parallelism")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    chosen = [DATA_PARALLEL, *(name for name in arguments.only or CANDIDATES if name != DATA_PARALLEL)]
    found = {}
    for number, name in enumerate(CANDIDATES):
        if name in chosen:
            run = arguments.folder / f"run-{number}"
            found[name] = measured(
                train((*arguments.set, *CANDIDATES[name]), run, arguments.folder / "store", arguments.processes)
            )
            print(f"{name}: {found[name]}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| | validation loss | to data parallel | MB sent by a process | to data parallel | seconds |")
    print("|---|---|---|---|---|---|")
    plain = found[DATA_PARALLEL]
    for name, row in found.items():
        loss, size = row["loss"] / plain["loss"] - 1, plain["megabytes"] / row["megabytes"]
        sent = [f"{row['megabytes']:,.1f}", f"1/{size:,.0f}", f"{row['seconds']:.0f}"]
        print("| " + " | ".join([name, f"{row['loss']:.4f}", f"{loss:+.1%}", *sent]) + " |")


if __name__ == "__main__":
    main()

"""Training speed of the same language model: genscale, a straight nanoGPT loop, Hugging Face Trainer, Lightning.

    python benchmarks/train_text.py --text tinyshakespeare.txt --peers-python /work/peers/bin/python

Each contender is a process of its own. They take turns, ``--repeats`` times; the table shows medians and, because
machines are shared and noisy, the ratio of each to genscale in the same round.
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
from pathlib import Path

import numpy as np

CONTENDERS = Path(__file__).with_name("contenders")
PEERS = {
    "straight loop (nanoGPT)": ("nanogpt.py", "eager"),
    "straight loop, compiled": ("nanogpt.py", "compile"),
    "Hugging Face Trainer": ("huggingface.py", "eager"),
    "Lightning Trainer": ("lightning_trainer.py", "eager"),
}
OURS = {"genscale": ("genscale_train.py", "eager"), "genscale, compiled": ("genscale_train.py", "compile")}


def prepare_store(text: str, shape: str, folder: Path) -> None:
    """The store that genscale reads, and the same training tokens as one array for the others."""
    from genscale.data.prepare import prepare
    from genscale.recipe.load import recipe_from_mapping

    characters = {"kind": "characters", "end_of_document": False}
    tokenizer = characters if shape == "char-10m" else {"kind": "bpe", "vocabulary": 8192}
    split = {"by": "tail", "validation": 0.1} if shape == "char-10m" else {"by": "document", "validation": 0.02}
    data = {"sources": [text], "store": str(folder / "store"), "tokenizer": tokenizer, "split": split}
    store = prepare(recipe_from_mapping({"data": data}))
    (folder / "data.json").write_text(json.dumps({key: data[key] for key in ("store", "tokenizer", "split")}))
    np.save(folder / "train.npy", np.concatenate(store.shards("train")))


def run_once(python: str, script: str, *words: object) -> dict[str, float]:
    """One contender's figures; its own error text when it fails."""
    environment = os.environ | {"BENCHMARK_STARTED": str(time.time())}
    command = [python, str(CONTENDERS / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python:stdlib", help="any source; for char-10m a text of 65 characters")
    parser.add_argument("--shape", default="char-10m", choices=("char-10m", "bpe-30m"))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", help="names of contenders; by default all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    contenders = {**{name: (sys.executable, *how) for name, how in OURS.items()}}
    contenders |= {name: (options.peers_python, *how) for name, how in PEERS.items()}
    if options.only:
        contenders = {name: how for name, how in contenders.items() if name in options.only}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_store(options.text, options.shape, folder)
        for number in range(options.repeats):
            for contender, (python, script, compiled) in contenders.items():
                print(f"round {number + 1}: {contender}", file=sys.stderr)
                words = (options.shape, folder, options.precision, options.steps, compiled)
                rounds[contender].append(run_once(python, script, *words))
    if options.json:
        print(json.dumps(rounds))
        return
    columns = ("tokens/s", "per CPU-second", "to genscale", "memory, MB", "first step, s")
    print(f"| {options.shape}, {options.precision} | " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|")
    for contender, figures in rounds.items():
        median = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        pairs = zip(figures, rounds.get("genscale", figures), strict=True)
        ratio = statistics.median(mine["per_second"] / ours["per_second"] for mine, ours in pairs)
        print(
            f"| {contender} | {median['per_second']:,.0f} | {median['per_cpu_second']:,.0f} "
            f"| {ratio:.2f} | {median['peak_memory_mb']:,.0f} | {median['start_to_first_step_s']:.1f} |"
        )


if __name__ == "__main__":
    main()

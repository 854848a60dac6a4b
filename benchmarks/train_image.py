"""Training speed of the same image networks: genscale, a straight loop, and packages that people install.

    python benchmarks/train_image.py --shape unet-9m --precision fp32 --peers-python /work/peers/bin/python
    python benchmarks/train_image.py --shape gan --precision fp32 --peers-python /work/peers/bin/python

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
OURS = {
    "unet": {
        "genscale": ("genscale_image.py", "eager"),
        "straight loop": ("image_loop.py", "eager"),
        "genscale, compiled": ("genscale_image.py", "compile"),
        "straight loop, compiled": ("image_loop.py", "compile"),
    },
    "gan": {
        "genscale": ("genscale_image.py", "eager"),
        "straight loop": ("gan_loop.py", "eager"),
    },
}
PEERS = {
    "unet": {
        "diffusers' example, accelerate": ("diffusers_loop.py", "eager"),
        "denoising-diffusion-pytorch": ("denoising_diffusion.py", "eager"),
    },
    "gan": {"torchgan": ("torchgan_trainer.py", "eager")},
}
ONLY_FP32 = ("torchgan",)


def prepare_store(source: str, folder: Path) -> None:
    """The store that genscale reads, and the same training images as one array for the others."""
    from genscale.data.prepare import prepare
    from genscale.recipe.load import recipe_from_mapping

    data = {"kind": "images", "sources": [source], "store": str(folder / "store"), "resolution": 32, "channels": 1}
    one_step = {"batch": "64 images", "budget": "1 step"}
    recipe = {"data": data, "model": {"kind": "unet"}, "objective": {"kind": "ddpm"}, "training": one_step}
    store = prepare(recipe_from_mapping(recipe))
    (folder / "data.json").write_text(
        json.dumps({key: data[key] for key in ("kind", "store", "resolution", "channels")})
    )
    images = np.concatenate(store.shards("train"))  # (images, height, width, channels)
    np.save(folder / "train.npy", images.transpose(0, 3, 1, 2))


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
    parser.add_argument("--data", default="builtin:digits", help="any source of images; they become 32 x 32, grey")
    parser.add_argument("--shape", default="unet-9m", choices=("unet-small", "unet-9m", "gan-small", "gan"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--only", nargs="*", help="names of contenders; by default all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    family = options.shape.split("-")[0]
    contenders = {name: (sys.executable, *how) for name, how in OURS[family].items()}
    contenders |= {name: (options.peers_python, *how) for name, how in PEERS[family].items()}
    if options.precision != "fp32":
        contenders = {name: how for name, how in contenders.items() if name not in ONLY_FP32}
    if options.only:
        contenders = {name: how for name, how in contenders.items() if name in options.only}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_store(options.data, folder)
        for number in range(options.repeats):
            for contender, (python, script, compiled) in contenders.items():
                print(f"round {number + 1}: {contender}", file=sys.stderr)
                words = (options.shape, folder, options.precision, options.steps, compiled, options.device)
                rounds[contender].append(run_once(python, script, *words))
    if options.json:
        print(json.dumps(rounds))
        return
    columns = ("images/s", "per CPU-second", "to genscale", "memory, MB", "first step, s", "parameters, M")
    print(f"| {options.shape}, {options.precision}, {options.device} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for contender, figures in rounds.items():
        median = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
        pairs = zip(figures, rounds.get("genscale", figures), strict=True)
        ratio = statistics.median(mine["per_second"] / ours["per_second"] for mine, ours in pairs)
        print(
            f"| {contender} | {median['per_second']:,.1f} | {median['per_cpu_second']:,.1f} | {ratio:.2f} "
            f"| {median['peak_memory_mb']:,.0f} | {median['start_to_first_step_s']:.1f} "
            f"| {median['parameters'] / 1e6:.2f} |"
        )


if __name__ == "__main__":
    main()

"""From raw text to tokens on disk: genscale against ``datasets.map`` with the same tokenizer.json and text.

    python benchmarks/prepare_text.py --megabytes 200 --repeats 3 --processes 2 --peers-python PYTHON

The text is Python's standard library, repeated with its names changed, as jsonl. Every run starts from nothing (own
cache folder); runs are interleaved; the table gives medians. CPU-seconds are those of the process and its children,
memory is the greatest sum of their resident sizes, sampled. Both must give equally many tokens. Training a tokenizer
is timed apart, against the trainer of ``tokenizers``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

GENSCALE = """
import json, sys
from genscale.data.prepare import prepare
from genscale.recipe.schema import Recipe
text, tokenizer, folder, processes = sys.argv[1:]
data = {"sources": [text], "tokenizer": {"kind": "file", "path": tokenizer}, "store": folder + "/store"}
store = prepare(Recipe.model_validate({"data": data}), workers=int(processes))
print(json.dumps({"tokens": store.tokens("train") + store.tokens("validation")}))
"""

DATASETS = """
import json, sys
import datasets, tokenizers
text, tokenizer, folder, processes = sys.argv[1:]
datasets.disable_progress_bars()
encoder = tokenizers.Tokenizer.from_file(tokenizer)
encoder.encode_special_tokens = True
end = encoder.token_to_id("<|endoftext|>")

def tokenise(rows):
    encodings = encoder.encode_batch_fast(rows["text"], add_special_tokens=False)
    ids = [encoding.ids + [end] for encoding in encodings]
    return {"ids": ids, "count": [len(row) for row in ids]}

raw = datasets.load_dataset("json", data_files=text, split="train", cache_dir=folder)
done = raw.map(tokenise, batched=True, remove_columns=raw.column_names, num_proc=int(processes))
print(json.dumps({"tokens": sum(done["count"])}))
"""


class Figures(NamedTuple):
    seconds: float
    cpu_seconds: float
    memory: float
    """MB."""
    tokens: int


def standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if "site-packages" not in file.parts]
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    return [text for text in texts if text]  # genscale leaves empty documents out


def write_text(file: Path, megabytes: int) -> None:
    """At least so much text as jsonl, one file of the library a line, names changed from one round to the next."""
    documents = standard_library()
    size = rounds = 0
    with open(file, "w", encoding="utf-8") as opened:
        while size < megabytes * 1e6:
            for document in documents:
                text = document.replace("self", f"self_{rounds}").replace("test", f"trial{rounds}")
                size += len(text)
                opened.write(json.dumps({"text": text}) + "\n")
            rounds += 1


def run(python: str, program: str, text: Path, tokenizer: Path, processes: int) -> Figures:
    """One run in a fresh process and a fresh folder."""
    import psutil

    folder = tempfile.mkdtemp(dir=text.parent)
    arguments = [python, "-c", program, str(text), str(tokenizer), folder, str(processes)]
    environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = psutil.Popen(arguments, stdout=output, env=environment, cwd=folder)
        memory = 0
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            memory = max(memory, resident(process))
            time.sleep(0.05)
        seconds = time.perf_counter() - begin
        output.seek(0)
        said = output.read()
    shutil.rmtree(folder)
    if status:
        sys.exit(f"failed: {python}\n{said}")
    tokens = json.loads(said.splitlines()[-1])["tokens"]
    return Figures(seconds, used.ru_utime + used.ru_stime, memory / 1e6, tokens)


def resident(process: object) -> int:
    """Bytes resident in a process and its descendants."""
    import psutil

    total = 0
    for one in [process, *process.children(recursive=True)]:  # type: ignore[attr-defined]
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def time_training(documents: list[str], vocabulary: int) -> list[tuple[str, float, float]]:
    """(name, seconds, CPU-seconds) of training BPE on the documents."""
    import tokenizers

    from genscale.data.tokenizer import PATTERN, train_bpe

    def by_tokenizers() -> None:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        )
        tokenizer.train_from_iterator(documents, trainer)

    found = []
    for name, train in (("genscale", lambda: train_bpe(documents, vocabulary)), ("tokenizers", by_tokenizers)):
        begin, cpu = time.perf_counter(), time.process_time()
        train()
        found.append((name, time.perf_counter() - begin, time.process_time() - cpu))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--peers-python", default="/work/peers/bin/python", help="a Python that has datasets")
    options = parser.parse_args()

    from genscale.data.tokenizer import train_bpe

    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = Path(folder, "text.jsonl"), Path(folder, "tokenizer.json")
        write_text(text, options.megabytes)
        library = standard_library()
        train_bpe(library, options.vocabulary).save(tokenizer)
        with open(text, encoding="utf-8") as lines:
            size = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
        programs = {"genscale": (sys.executable, GENSCALE), "datasets.map": (options.peers_python, DATASETS)}
        results: dict[str, list[Figures]] = {name: [] for name in programs}
        for _ in range(options.repeats):
            for name, (python, program) in programs.items():
                results[name].append(run(python, program, text, tokenizer, options.processes))
                print(f"{name}: {results[name][-1]}", file=sys.stderr)
    tokens = {figures.tokens for found in results.values() for figures in found}
    if len(tokens) != 1:
        sys.exit(f"the two do not give equally many tokens: {tokens}")
    medians = {name: Figures(*map(statistics.median, zip(*found, strict=True))) for name, found in results.items()}
    print(
        f"{size:.0f} MB of text, {tokens.pop():,} tokens, {options.processes} processes, "
        f"vocabulary {options.vocabulary}, medians of {options.repeats}\n"
    )
    print("| | MB/s | MB per CPU-second | CPU-seconds | peak memory, MB |\n|---|---|---|---|---|")
    for name, found in medians.items():
        print(
            f"| {name} | {size / found.seconds:.1f} | {size / found.cpu_seconds:.1f} | {found.cpu_seconds:.1f} "
            f"| {found.memory:.0f} |"
        )
    ours, peer = medians["genscale"], medians["datasets.map"]
    print(f"| ratio | {peer.seconds / ours.seconds:.1f} | {peer.cpu_seconds / ours.cpu_seconds:.1f} | | |\n")
    size = sum(len(document.encode()) for document in library) / 1e6
    print(f"Training a tokenizer on {size:.0f} MB\n\n| | seconds | MB per CPU-second |\n|---|---|---|")
    for name, seconds, cpu_seconds in time_training(library, options.vocabulary):
        print(f"| {name} | {seconds:.1f} | {size / cpu_seconds:.1f} |")


if __name__ == "__main__":
    main()

"""What is in a prepared store of text, and how much memory preparing takes."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tokenizers
from preparing import SOURCES, corpus_recipe, documents, recipe

from genscale.data import text_prepare as module
from genscale.data.prepare import prepare
from genscale.data.tokenizer import END_OF_DOCUMENT, train_bpe
from genscale.runtime.errors import UserError


def test_every_document_is_stored_with_the_ids_of_the_library_tokenizers(
    tmp_path: Path, corpus: Path, small_units: None
) -> None:
    store = prepare(corpus_recipe(tmp_path, corpus), workers=2)
    store.verify()
    library = tokenizers.Tokenizer.from_file(str(store.path / "tokenizer.json"))
    library.encode_special_tokens = True
    end = library.token_to_id(END_OF_DOCUMENT)
    encode = functools.cache(lambda text: library.encode(text).ids)  # many texts are there more than once
    expected = {}
    for file in sorted(corpus.iterdir()):
        if file.suffix in (".py", ".txt"):
            expected[file.name, 0] = file.read_bytes().decode(errors="replace")
    rows = [json.loads(line) for line in (corpus / "b.jsonl").read_text().splitlines()]
    offset = 0
    for number, line in enumerate((corpus / "b.jsonl").read_bytes().splitlines(keepends=True)):
        for path in ("b.jsonl", "c.jsonl.gz"):
            expected[path, offset] = rows[number]["text"]
        expected["d.parquet", number] = rows[number]["text"]
        offset += len(line)
    del expected["empty.txt", 0]
    found = {}
    for row, tokens in documents(store):
        text = expected[row["path"], row["position"]]
        assert tokens == [*encode(text), end], row["path"]
        assert row["size"] == len(text.encode())
        assert (row["licence"], row["source"]) == ("PSF-2.0", str(corpus))
        found[row["path"], row["position"]] = row
    assert found.keys() == expected.keys()
    for split in ("train", "validation"):
        own = [row for row in found.values() if row["split"] == split]
        assert store.tokens(split) == sum(row["tokens"] for row in own) == sum(map(len, store.shards(split)))
        assert store.bytes(split) == sum(row["size"] for row in own)
        assert store.document_starts(split).tolist() == sorted(row["start"] for row in own)
    (source,) = store.manifest["sources"]
    assert {name: source[name] for name in ("undecodable", "damaged", "dropped", "empty")} == {
        "undecodable": 1,
        "damaged": 0,
        "dropped": 0,
        "empty": 1,
    }
    assert source["notes"] == [f"{corpus}/latin.txt: not UTF-8 from byte 1 on"]
    assert source["splits"]["train"]["tokens"] == store.tokens("train")
    assert store.manifest["encoder"] == "fastokens"


def test_the_same_text_never_sits_on_both_sides(tmp_path: Path, corpus: Path) -> None:
    store = prepare(corpus_recipe(tmp_path, corpus))
    rows = store.documents().to_pylist()
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["hash"], set()).add(row["split"])
    assert len(sides) < len(rows)  # there are duplicates
    assert {side for found in sides.values() for side in found} == {"train", "validation"}
    assert all(len(found) == 1 for found in sides.values())


def test_the_fraction_held_out_and_its_seed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3000)))
    held_out = []
    for seed in (0, 1):
        made = recipe(tmp_path, str(tmp_path / "a.jsonl"), tokenizer={"kind": "characters"}, seed=seed)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        store = prepare(made)
        held_out.append({r["position"] for r in store.documents().to_pylist() if r["split"] == "validation"})
        assert len(held_out[-1]) / 3000 == pytest.approx(0.2, abs=0.03)
    assert len(held_out[0] & held_out[1]) < 250


@pytest.mark.parametrize("end_of_document", [True, False])
def test_tail_holds_out_the_last_characters_of_each_document(tmp_path: Path, end_of_document: bool) -> None:
    texts = ["x", "日本語" * 100, "".join(file.read_text() for file in SOURCES[:40])]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    kind = {"kind": "characters", "end_of_document": end_of_document}
    store = prepare(recipe(tmp_path, f"{tmp_path}/*.txt", tokenizer=kind, split={"by": "tail", "validation": 0.1}))
    found: dict[int, dict[str, str]] = {}
    for row, tokens in documents(store):
        text = store.tokenizer.decode(tokens)
        assert row["size"] == len(text.encode())
        assert (tokens[-1] == store.tokenizer.end_of_document) == end_of_document
        found.setdefault(row["id"], {})[row["split"]] = text
    assert found[0] == {"validation": "x"}
    for number, text in enumerate(texts):
        assert found[number].get("train", "") + found[number]["validation"] == text
        assert len(found[number]["validation"]) == pytest.approx(0.1 * len(text), abs=1)


def test_a_long_text_is_one_document_with_the_tokens_of_the_whole(
    tmp_path: Path, corpus: Path, small_units: None
) -> None:
    text = (corpus / "long.txt").read_text()
    split = {"by": "tail", "validation": 0.3}
    store = prepare(recipe(tmp_path, str(corpus / "long.txt"), split=split), workers=2)
    library = tokenizers.Tokenizer.from_file(str(store.path / "tokenizer.json"))
    boundary = int(len(text) * (1 - 0.3))
    rows = list(documents(store))
    assert [(row["id"], row["split"]) for row, _ in rows] == [(0, "train"), (0, "validation")]
    for (_, tokens), part in zip(rows, (text[:boundary], text[boundary:]), strict=True):
        assert tokens == [*library.encode(part).ids, store.tokenizer.end_of_document]


def test_characters_of_the_whole_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\nworld")
    made = recipe(tmp_path, str(tmp_path / "a.txt"), tokenizer={"kind": "characters"}, split={"by": "tail"})
    store = prepare(made)
    assert store.tokenizer.size == len(set("hello\nworld")) + 1
    assert store.manifest["encoder"] == "characters"
    assert store.tokenizer.decode(store.shards("train")[0]) == "hello\nworl"


def test_the_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path, corpus: Path, small_units: None) -> None:
    store = prepare(corpus_recipe(tmp_path, corpus, tokenizer={"kind": "bpe", "vocabulary": 700}), workers=1)
    texts = [store.tokenizer.decode(tokens) for row, tokens in documents(store) if row["split"] == "train"]
    assert train_bpe(texts, 700).fingerprint == store.tokenizer.fingerprint


def test_the_tokenizer_sees_at_most_training_bytes(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    seen: list[str] = []

    def recording(texts: Iterator[str], vocabulary: int) -> Any:
        seen.extend(texts)
        return train_bpe(seen, vocabulary)

    monkeypatch.setattr(module, "train_bpe", recording)
    sizes = {}
    for wanted in (1000, 100_000, 300_000):
        seen.clear()
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        tokenizer = {"kind": "bpe", "vocabulary": 300, "training_bytes": wanted}
        store = prepare(corpus_recipe(tmp_path, corpus, tokenizer=tokenizer), workers=1)
        sizes[wanted] = sum(len(text.encode()) for text in seen)
        train = {store.tokenizer.decode(tokens) for row, tokens in documents(store) if row["split"] == "train"}
        assert all(any(text in whole for whole in train) for text in seen)
    assert all(wanted - 3 <= size <= wanted for wanted, size in sizes.items())  # but for half a character


def test_a_given_tokenizer(tmp_path: Path, corpus: Path) -> None:
    given = train_bpe([(corpus / "long.txt").read_text()], 1000)
    given.save(tmp_path / "given.json")
    made = corpus_recipe(tmp_path, corpus, tokenizer={"kind": "file", "path": str(tmp_path / "given.json")})
    store = prepare(made)
    assert (store.path / "tokenizer.json").read_text() == given.content
    assert store.tokenizer.fingerprint == given.fingerprint
    given.save(tmp_path / "given.json")
    assert prepare(made).fingerprint == store.fingerprint
    train_bpe([(corpus / "long.txt").read_text()], 900).save(tmp_path / "given.json")
    with pytest.raises(UserError, match=r"the tokenizer file .*given\.json was changed since"):
        prepare(made)


def test_sources_of_other_file_systems(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for number in range(30):
        system.pipe(f"/texts/{number}.txt.gz", gzip.compress(f"document {number}".encode()))
    store = prepare(recipe(tmp_path, "memory://texts/*.gz", tokenizer={"kind": "characters"}), workers=2)
    assert store.manifest["documents"] == 30
    system.rm("/texts", recursive=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_memory_is_bounded(tmp_path: Path, ending: str) -> None:
    """200 MB of text in a process and a worker that hold less than that between them and the libraries."""
    text = "".join(file.read_text(encoding="utf-8") for file in SOURCES)
    with open(tmp_path / f"a.{ending}", "w", encoding="utf-8") as file:
        size = number = 0
        while size < 200_000_000:
            number += 1
            varied = text.replace("self", f"self_{number}")
            if ending == "jsonl":
                varied = "".join(json.dumps({"text": part}) + "\n" for part in varied.split("\nclass "))
            size += file.write(varied)
    program = textwrap.dedent("""
        import re, resource, sys
        from genscale.data.prepare import prepare
        from genscale.recipe.schema import Recipe
        prepare(Recipe.model_validate_json(sys.argv[1]), workers=1)
        # Not ru_maxrss, which a process takes over from the one that started it.
        print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
    """)
    tokenizer = {"kind": "bpe", "vocabulary": 1000, "training_bytes": 10_000_000}
    made = recipe(tmp_path, str(tmp_path / f"a.{ending}"), tokenizer=tokenizer, split={"by": "tail"})
    ended = subprocess.run(
        [sys.executable, "-c", program, made.model_dump_json()], capture_output=True, text=True, check=True
    )
    parent, child = map(int, ended.stdout.split())
    assert parent < 320, f"{parent} MB"
    assert child < 320, f"{child} MB"

from __future__ import annotations

import errno
import functools
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from genscale.data import preparation, units, work
from genscale.data import store as store_module
from genscale.data import text_prepare as module
from genscale.data.prepare import prepare
from genscale.data.sources import list_files
from genscale.data.store import Store
from genscale.data.tokenizer import END_OF_DOCUMENT, character_tokenizer, train_bpe
from genscale.data.workers import Workers
from genscale.recipe.data import Source
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SOURCES = sorted(LIBRARY.glob("[a-c]*.py"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small units, so that a small corpus is worth several workers."""
    for module_name, name, value in (
        ("text_prepare", "UNIT", 100_000),
        ("units", "UNIT", 100_000),
        ("units", "LONG", 600_000),
        ("preparation", "_SMALL", 0),
    ):
        monkeypatch.setattr(f"genscale.data.{module_name}.{name}", value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in every format: the same text in different ones, empty ones, bytes that are not UTF-8, a long text."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [file.read_text(encoding="utf-8") for file in SOURCES]
    for file, text in zip(SOURCES[:10], texts[:10], strict=True):
        (folder / file.name).write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 9)
    rows = [{"text": text, "id": i} for i, text in enumerate(texts[5:25])]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=4)
    pieces = "".join(text for _ in range(12) for text in texts[:30:3])
    (folder / "long.txt").write_text(pieces.replace("self", "this"))
    assert (folder / "long.txt").stat().st_size > 2_500_000
    return folder


def recipe(folder: Path, *sources: str | dict[str, Any], **data: Any) -> Recipe:
    values = {"tokenizer": {"kind": "bpe", "vocabulary": 600}, "split": {"validation": 0.2}, **data}
    return Recipe.model_validate(
        {"data": {"kind": "text", "sources": sources, "store": str(folder / "store"), **values}}
    )


def documents(store: Store) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each row of the documents table with its tokens."""
    tokens = {split: np.concatenate([*store.shards(split), []]).astype(int) for split in ("train", "validation")}
    for row in store.documents().to_pylist():
        yield row, tokens[row["split"]][row["start"] : row["start"] + row["tokens"]].tolist()


def corpus_recipe(tmp_path: Path, corpus: Path, **data: Any) -> Recipe:
    return recipe(tmp_path, {"path": str(corpus), "licence": "PSF-2.0"}, **data)


# What is in a store


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


# The same store, whatever happens on the way


def test_one_or_two_workers_or_none_make_the_same_store(tmp_path: Path, corpus: Path, small_units: None) -> None:
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        store = prepare(corpus_recipe(tmp_path / name, corpus), workers=count)
        found[name] = (store.fingerprint, store.manifest["files"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_SMALL", 1 << 40)
        store = prepare(corpus_recipe(tmp_path / "none", corpus))
        found["none"] = (store.fingerprint, store.manifest["files"])
    assert found["one"] == found["two"] == found["none"]


def test_the_size_of_units_does_not_show(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for size in (50_000, 300_000, 1 << 30):
        monkeypatch.setattr(units, "UNIT", size)
        found.add(prepare(corpus_recipe(tmp_path / str(size), corpus)).fingerprint)
    assert len(found) == 1


KILLED = """
    import os, signal, sys
    from genscale.data import preparation, text_prepare, units
    from genscale.data.prepare import prepare
    from genscale.recipe.schema import Recipe
    units.UNIT = text_prepare.UNIT = 100_000
    units.LONG, preparation._SMALL = 600_000, 0
    stage, share = sys.argv[2], float(sys.argv[3])
    def progress(name, done, total, unit):
        if name == stage and done >= share * (total or 1):
            os.killpg(0, signal.SIGKILL)
    prepare(Recipe.model_validate_json(sys.argv[1]), workers=2, on_progress=progress)
    raise SystemExit("was not killed")
"""


def kill_at(made: Recipe, stage: str, share: float) -> None:
    """Prepare in another process group that is killed, workers and all, at this point."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), made.model_dump_json(), stage, str(share)]
    ended = subprocess.run(command, start_new_session=True, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_preparation_goes_on_and_ends_the_same(
    tmp_path: Path, corpus: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(corpus_recipe(tmp_path / "whole", corpus), workers=1)
    made = corpus_recipe(tmp_path, corpus)
    partial = tmp_path / "store.partial"
    moments = [
        ("measuring long texts", 0.5),
        ("surveying text", 0.4),
        ("training the tokenizer", 0.5),
        ("tokenising", 0.3),
        ("tokenising", 0.7),
        ("writing the store", 0.5),
    ]
    for stage, share in moments:
        kill_at(made, stage, share)
        assert partial.exists()
        assert not (tmp_path / "store").exists()
        with pytest.raises(UserError, match="is not finished"):
            Store.open(tmp_path / "store")
    done = sorted(folder.name for folder in (partial / "encode").glob("[0-9]*"))
    # One of the finished units is torn: it is done again, and no other.
    torn = partial / "encode" / done[0] / "train.tokens"
    torn.write_bytes(torn.read_bytes()[:-2])
    again: list[int] = []
    encode = work.encode

    def counting(job: work.Job, *arguments: Any) -> Any:
        again.append(job.unit.number)
        return encode(job, *arguments)

    monkeypatch.setattr(work, "encode", counting)
    monkeypatch.setattr(preparation, "_SMALL", 1 << 40)  # in this process, to be counted
    store = prepare(made)
    assert again == [int(done[0])]
    assert (store.fingerprint, store.manifest["files"]) == (whole.fingerprint, whole.manifest["files"])
    assert sorted(os.listdir(tmp_path)) == ["store", "whole"]
    store.verify()


def test_finished_units_are_not_done_again(tmp_path: Path, corpus: Path, small_units: None) -> None:
    made = corpus_recipe(tmp_path, corpus)
    kill_at(made, "tokenising", 0.3)
    folder = tmp_path / "store.partial" / "encode"
    for unit in sorted(folder.glob("[0-9]*"))[2:]:  # how many were done when the kill came is a matter of luck
        shutil.rmtree(unit)
    before = {unit.name: unit.stat().st_ino for unit in folder.glob("[0-9]*")}
    assert before
    kill_at(made, "tokenising", 0.9)
    after = {unit.name: unit.stat().st_ino for unit in folder.glob("[0-9]*")}
    assert len(after) > len(before)
    assert before.items() <= after.items()


def test_a_partial_folder_of_other_inputs_is_begun_afresh(tmp_path: Path, corpus: Path, small_units: None) -> None:
    kill_at(corpus_recipe(tmp_path, corpus, tokenizer={"kind": "characters"}), "tokenising", 0.5)
    store = prepare(corpus_recipe(tmp_path, corpus), workers=1)
    assert store.tokenizer.size == 600


def test_a_finished_store_is_returned_at_once(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = corpus_recipe(tmp_path, corpus)
    first = prepare(made)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the store was made again")

    monkeypatch.setattr(module, "plan", refuse)
    assert prepare(made).manifest == first.manifest


def test_a_store_from_before_a_key_existed_is_one_with_its_default(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    made = recipe(tmp_path, f"{tmp_path}/*.txt", tokenizer={"kind": "bpe", "vocabulary": 260})
    first = prepare(made)
    manifest = json.loads((first.path / "manifest.json").read_text())
    del manifest["inputs"]["data"]["tokenizer"]["dropout"]
    (first.path / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(made).fingerprint == first.fingerprint
    dropped = recipe(tmp_path, f"{tmp_path}/*.txt", tokenizer={"kind": "bpe", "vocabulary": 260, "dropout": 0.1})
    assert "data.tokenizer.dropout was 0.0, is 0.1" in refusal(dropped)


def test_a_finished_store_outlives_its_sources(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    made = recipe(tmp_path, f"{tmp_path}/*.txt", tokenizer={"kind": "characters"})
    first = prepare(made)
    for number in range(20):
        (tmp_path / f"{number}.txt").unlink()
    assert prepare(made).fingerprint == first.fingerprint
    shutil.rmtree(first.path)
    with pytest.raises(UserError, match="matches no file"):
        prepare(made)


def test_progress_is_told(tmp_path: Path, corpus: Path, small_units: None) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    prepare(
        corpus_recipe(tmp_path, corpus),
        workers=2,
        on_progress=lambda stage, done, total, unit: told.setdefault(stage, []).append((done, total)),
    )
    assert list(told) == [
        "listing sources",
        "measuring long texts",
        "surveying text",
        "training the tokenizer",
        "tokenising",
        "writing the store",
    ]
    for stage, steps in told.items():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        if stage != "listing sources":
            assert steps[-1][0] == steps[-1][1]


# What a user gets wrong


def refusal(made: Recipe, count: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        prepare(made, workers=count)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tokenizer": {"kind": "bpe", "vocabulary": 700}}, "data.tokenizer.vocabulary was 600, is 700"),
        ({"seed": 5}, "data.seed was 0, is 5"),
        ({"split": {"validation": 0.3}}, "data.split.validation was 0.2, is 0.3"),
        ({"tokenizer": {"kind": "characters"}}, "data.tokenizer.kind was bpe, is characters"),
    ],
)
def test_a_store_made_by_another_recipe(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    text = SOURCES[0].read_text()
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} {text[number * 200 :]}")
    source = f"{tmp_path}/*.txt"
    prepare(recipe(tmp_path, source))
    assert refusal(recipe(tmp_path, source, **change)) == (
        f"the store {tmp_path}/store was made from other inputs: {difference}; "
        "choose another data.store or delete that folder"
    )


def test_a_store_made_from_other_files(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    made = recipe(tmp_path, f"{tmp_path}/*.txt", tokenizer={"kind": "characters"})
    prepare(made)
    os.utime(tmp_path / "3.txt", ns=(5, 5))
    assert f"files of the source '{tmp_path}/*.txt' were modified or renamed since" in refusal(made)
    (tmp_path / "more.txt").write_text("x" * 10)
    assert "had 30 files of 320 bytes, has 31 files of 330 bytes" in refusal(made)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.doc").write_text("x")
    (tmp_path / "a.txt").write_text("abc")
    message = refusal(recipe(tmp_path, str(tmp_path / "a.txt")))
    assert message == (
        f"data.store: {tmp_path}/store exists and is not a store; choose another data.store or delete it"
    )


def test_two_processes_at_one_store(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    made = recipe(tmp_path, str(tmp_path / "a.txt"), split={"by": "tail"}, tokenizer={"kind": "characters"})
    with preparation.locked(tmp_path / "store"):
        assert refusal(made) == (
            f"another process (pid {os.getpid()}) is preparing the store {tmp_path}/store; wait until it has finished"
        )
    prepare(made)
    assert not list(tmp_path.glob(".*"))


def test_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("abc")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    made = recipe(tmp_path, str(tmp_path / "good.txt"), str(tmp_path / "empty.jsonl"), split={"by": "tail"})
    assert refusal(made) == f"the source '{tmp_path}/empty.jsonl' holds no text (2 empty documents)"
    (tmp_path / "nothing.txt").write_text("")
    made = recipe(tmp_path, str(tmp_path / "nothing.txt"))
    assert refusal(made) == f"the source '{tmp_path}/nothing.txt' holds no text (1 empty documents)"


def test_a_missing_source(tmp_path: Path) -> None:
    message = refusal(recipe(tmp_path, str(tmp_path / "no.txt")))
    assert message == f"data.sources[0]: there is no file or folder '{tmp_path}/no.txt'"
    assert refusal(recipe(tmp_path)).startswith("data.sources is empty")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fraction", "split", "other"), [(1e-9, "validation", "larger"), (1 - 1e-9, "train", "smaller")]
)
def test_no_document_in_a_split(tmp_path: Path, fraction: float, split: str, other: str) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    made = recipe(tmp_path, str(tmp_path / "a.txt"), split={"validation": fraction})
    assert refusal(made) == (
        f"data.split: none of the 1 documents falls into the {split} split; "
        f"use split.by=tail or a {other} split.validation than {fraction}"
    )


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab abc abcd " * 9)
    made = recipe(
        tmp_path, str(tmp_path / "a.txt"), tokenizer={"kind": "bpe", "vocabulary": 4096}, split={"by": "tail"}
    )
    assert "data.tokenizer.vocabulary: 4096 tokens need 3839 merges, but the training text has only" in refusal(made)


def test_undecodable_and_damaged_input_stops_or_is_counted(tmp_path: Path, small_units: None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "document %d"}\n' % i for i in range(50)))
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": \n')
    source, kind = str(tmp_path / "a.jsonl"), {"kind": "characters"}
    assert refusal(recipe(tmp_path, source, tokenizer=kind, undecodable="fail", damaged="drop"), 1).startswith(
        f"{source}, line 51: not UTF-8 from byte 10 on; data.undecodable 'replace'"
    )
    assert refusal(recipe(tmp_path, source, tokenizer=kind), 1).startswith(f"{source}, line 52: damaged (not JSON")
    store = prepare(recipe(tmp_path, source, tokenizer=kind, undecodable="drop", damaged="drop"), workers=1)
    assert store.manifest["documents"] == 50
    report = store.manifest["sources"][0]
    assert (report["undecodable"], report["dropped"], report["damaged"]) == (1, 1, 1)


def test_a_character_that_a_given_tokenizer_lacks(tmp_path: Path) -> None:
    character_tokenizer("abc").save(tmp_path / "given.json")
    (tmp_path / "a.txt").write_text("abc" * 10 + "d")
    made = recipe(
        tmp_path,
        str(tmp_path / "a.txt"),
        tokenizer={"kind": "file", "path": str(tmp_path / "given.json")},
        split={"by": "tail"},
    )
    assert refusal(made).startswith("a.txt: the character 'd' (U+0064) is not in the tokenizer's vocabulary")


def test_a_given_tokenizer_without_an_end_of_document(tmp_path: Path) -> None:
    character_tokenizer("abc", end_of_document=False).save(tmp_path / "given.json")
    (tmp_path / "a.txt").write_text("abc")
    given = {"kind": "file", "path": str(tmp_path / "given.json")}
    assert refusal(recipe(tmp_path, str(tmp_path / "a.txt"), tokenizer=given)) == (
        f"{tmp_path}/given.json has none of the tokens <|endoftext|>, <|end_of_text|>, </s>, <eos>; "
        "name the one that ends a document in data.tokenizer.end_of_document"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "data.store: cannot write to" in refusal(recipe(tmp_path / "locked", str(tmp_path / "a.txt")))


# A full disk, and workers that die


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk(small_disk: Path, tmp_path: Path, corpus: Path, small_units: None, count: int) -> None:
    made = corpus_recipe(small_disk, corpus)
    message = refusal(made, count)
    assert message.startswith(f"the disk is full: cannot write to {small_disk}/store.partial")
    assert message.endswith("; free some space, and the same command goes on from here")
    assert not (small_disk / "store").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    store = prepare(made, workers=count)
    store.verify()
    assert store.fingerprint == prepare(corpus_recipe(tmp_path / "large", corpus), workers=count).fingerprint


def test_a_disk_that_fills_up_at_the_last_step(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = corpus_recipe(tmp_path, corpus)

    def full(self: object, values: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.ArrayFile, "append", full)
        assert refusal(made).startswith(f"the disk is full: cannot write to {tmp_path}/store.partial")
    assert not (tmp_path / "store").exists()
    prepare(made).verify()


def test_a_worker_that_is_killed_is_told(tmp_path: Path, corpus: Path, small_units: None) -> None:
    def kill_a_worker(stage: str, done: int, total: int | None, unit: str) -> None:
        if stage == "tokenising":
            children = Path(f"/proc/self/task/{os.getpid()}/children")
            if not children.exists():
                pytest.skip("this system does not list a process's children")
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)

    made = corpus_recipe(tmp_path, corpus)
    with pytest.raises(UserError, match=r"a worker process ended \(SIGKILL\) while it read .* the same command"):
        prepare(made, workers=1, on_progress=kill_a_worker)
    prepare(made, workers=1).verify()


def test_a_fault_of_ours_in_a_worker_keeps_its_traceback(tmp_path: Path, corpus: Path) -> None:
    (file,) = list_files([Source(path=str(corpus / "b.jsonl"))])
    job = work.Job("encode", units.Unit(0, (units.Piece(file),), 0, 0), recipe(tmp_path).data, tmp_path)
    with pytest.raises(AssertionError):
        Workers(0).run([job], lambda unit, done: None)
    with (
        Workers(1) as pool,
        pytest.raises(RuntimeError, match=r"a worker failed on .*b\.jsonl:\n(.*\n)+AssertionError"),
    ):
        pool.run([job], lambda unit, done: None)


# Memory


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

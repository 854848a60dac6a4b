"""What a user gets wrong in preparing text; a full disk, and workers that die."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from preparing import SOURCES, corpus_recipe, recipe, refusal

from genscale.data import preparation, units, work
from genscale.data import store as store_module
from genscale.data.prepare import prepare
from genscale.data.sources import list_files
from genscale.data.tokenizer import character_tokenizer
from genscale.data.workers import Workers
from genscale.recipe.data import Source
from genscale.runtime.errors import UserError


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

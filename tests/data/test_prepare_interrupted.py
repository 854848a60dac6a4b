"""Preparing text gives the same store, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from preparing import corpus_recipe, recipe, refusal

from genscale.data import preparation, units, work
from genscale.data import text_prepare as module
from genscale.data.prepare import prepare
from genscale.data.store import Store
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError


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

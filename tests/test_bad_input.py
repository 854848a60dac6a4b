"""Bad input, line by line of the list that genscale promises to survive, through the real command line.

Each mistake is one line on standard error and exit code 2, and leaves nothing in the way: the mended command works.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.cli.main import main
from genscale.data.tokenizer import character_tokenizer
from genscale.runs.run import Run

RECIPE = """\
name: small
data:
  sources: [corpus]
  tokenizer: {vocabulary: 300}
  split: {by: tail, validation: 0.1}
model: {layers: 1, width: 16, heads: 1, hidden: 32, context: 16}
training:
  budget: 40 steps
  batch: 4 samples
  validation: {every: 20 steps, amount: 8 samples}
  checkpoints: {every: 5 steps}
  log_every: 1
layout: {device: cpu, compile: false, precision: fp32, micro_batch: 4}
sampling: {prompts: ["import "], tokens: 4}
"""
MODULES = ("abc", "bisect", "heapq", "queue", "calendar")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: some texts, and a recipe."""
    (tmp_path / "corpus").mkdir()
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib"), f"{name}.py"), tmp_path / "corpus")
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in the folder: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(words)
        return exit.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return call


@pytest.fixture
def refused(call: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The one line that a command ends with."""

    def refused(*words: str) -> str:
        code, out, err = call(*words, "--json")  # without a progress display
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return refused


@pytest.fixture
def works(call: Callable[..., tuple[int, str, str]]) -> Callable[..., dict]:
    """What a command prints as JSON."""

    def works(*words: str) -> dict:
        code, out, err = call(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return works


def losses(run: str) -> list[float]:
    return [record["loss"] for record in Run.open(run).metrics() if "loss" in record]


# The recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("training:", "trainning:", "small.yaml, line 7: trainning: unknown key, did you mean 'training'?"),
        ("  budget:", "  bugdet:", "small.yaml, line 8: training.bugdet: unknown key, did you mean 'budget'?"),
        ("layers: 1", "layers: one", "small.yaml, line 6: model.layers: expected a whole number, found 'one'"),
        ("budget: 40 steps", "budget: 40", "small.yaml, line 8: training.budget: expected an amount such as "),
        ("heads: 1", "heads: 3", "small.yaml, line 6: model: heads (3) must divide width (16), or head_width be given"),
        (
            "micro_batch: 4",
            "micro_batch: 8",
            "small.yaml, line 13: layout.micro_batch (8 samples) is larger than training.batch (4 samples)",
        ),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["data", "prepare"]], ids=" ".join)
def test_a_mistake_in_the_recipe(
    folder: Path, refused: Callable[..., str], command: list[str], old: str, new: str, message: str
) -> None:
    (folder / "small.yaml").write_text(RECIPE.replace(old, new))
    assert refused(*command, "small.yaml").startswith(message)
    assert sorted(os.listdir(folder)) == ["corpus", "small.yaml"]


def test_a_context_longer_than_the_data(folder: Path, refused: Callable[..., str], works: Callable[..., dict]) -> None:
    message = refused("train", "small.yaml", "model.context=100000")
    tokens = works("data", "report", "stores/small")["splits"]["train"]["tokens"]
    assert message == f"model.context (100000) is longer than the training split ({tokens} tokens) of stores/small"
    assert not (folder / "runs").exists()
    assert works("train", "small.yaml")["status"] == "finished"


def test_what_only_building_the_model_shows_leaves_the_directory_free(
    refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    message = refused("train", "small.yaml", "objective.kind=infill", "model.context=8")
    assert message == "model.context: an infill objective needs at least 16 tokens, not 8"
    assert works("train", "small.yaml")["status"] == "finished"


# Sources


def test_a_missing_source(folder: Path, refused: Callable[..., str], works: Callable[..., dict]) -> None:
    (folder / "small.yaml").write_text(RECIPE.replace("[corpus]", "[corpsu]"))
    message = "data.sources[0]: there is no file or folder 'corpsu', did you mean 'corpus'?"
    assert refused("data", "prepare", "small.yaml") == refused("train", "small.yaml") == message
    assert refused("data", "prepare", "small.yaml", "data.sources=['*.csv']") == (
        "data.sources[0]: '*.csv' matches no file"
    )
    assert refused("data", "prepare", "small.yaml", "data.sources=[]").startswith("data.sources is empty; expected ")
    (folder / "small.yaml").write_text(RECIPE)
    works("data", "prepare", "small.yaml")


def test_an_empty_source(folder: Path, refused: Callable[..., str], works: Callable[..., dict]) -> None:
    (folder / "empty").mkdir()
    assert refused("train", "small.yaml", "data.sources=[empty]") == "data.sources[0]: 'empty' matches no file"
    (folder / "empty" / "nothing.txt").write_text("")
    message = refused("train", "small.yaml", "data.sources=[empty]")
    assert message == "the source 'empty' holds no text (1 empty documents)"
    assert not (folder / "stores" / "small").exists()
    assert works("data", "prepare", "small.yaml")["splits"]["train"]["documents"] == len(MODULES)


def test_undecodable_bytes(
    folder: Path, refused: Callable[..., str], works: Callable[..., dict], call: Callable[..., tuple[int, str, str]]
) -> None:
    (folder / "corpus" / "latin.txt").write_bytes("Ein schöner Tag in Köln. ".encode("latin-1") * 20)
    words = ("data", "prepare", "small.yaml")
    message = refused(*words, "data.undecodable=fail")
    assert message.startswith("corpus/latin.txt: not UTF-8 from byte 7 on; data.undecodable 'replace' puts U+FFFD")
    dropped = works(*words, "data.undecodable=drop", "data.store=stores/dropped")
    replaced = works(*words)
    assert dropped["sources"]["corpus"]["documents"] == len(MODULES)
    assert replaced["sources"]["corpus"]["documents"] == len(MODULES) + 1
    note = "corpus/latin.txt: not UTF-8 from byte 7 on"
    counts = {"source": "corpus", "undecodable": 1, "damaged": 0, "empty": 0, "notes": [note]}
    assert dropped["faults"] == [counts | {"dropped": 1}]
    assert replaced["faults"] == [counts | {"dropped": 0}]
    _, printed, _ = call("data", "report", "stores/dropped")
    assert printed.endswith(f"\ncorpus: 1 undecodable documents, 1 of them dropped\n  {note}\n")


def test_a_damaged_row_group(folder: Path, refused: Callable[..., str], works: Callable[..., dict]) -> None:
    texts = [file.read_text() for file in sorted((folder / "corpus").iterdir())]
    file = folder / "texts.parquet"
    pq.write_table(pa.table({"text": texts}), file, row_group_size=1, use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(file).metadata.row_group(2).column(0)
    with open(file, "r+b") as opened:
        opened.seek(column.data_page_offset + column.total_compressed_size - 20)
        opened.write(bytes(20))
    words = ("data", "prepare", "small.yaml", "data.sources=[texts.parquet]")
    message = refused(*words)
    assert message.startswith("texts.parquet, row group 2 from row 2 on: damaged (")
    assert message.endswith("; data.damaged 'drop' leaves it out")
    made = works(*words, "data.damaged=drop")
    assert made["sources"]["texts.parquet"]["documents"] == len(texts) - 1
    [faults] = made["faults"]
    assert (faults["source"], faults["damaged"], len(faults["notes"])) == ("texts.parquet", 1, 1)


# The vocabulary


def test_a_vocabulary_that_the_text_cannot_fill(refused: Callable[..., str], works: Callable[..., dict]) -> None:
    message = refused("train", "small.yaml", "data.tokenizer.vocabulary=60000")
    assert message.startswith("data.tokenizer.vocabulary: 60000 tokens need 59743 merges, but the training text has ")
    largest = message.split("expected at most ")[1].split(",")[0]
    assert works("data", "prepare", "small.yaml", f"data.tokenizer.vocabulary={largest}")["vocabulary"] == int(largest)


def test_a_tokenizer_file_that_does_not_fit(
    folder: Path, refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    def prepare(file: str) -> tuple[str, ...]:
        return "data", "prepare", "small.yaml", f"data.tokenizer={{kind: file, path: {file}}}"

    text = "".join(file.read_text() for file in (folder / "corpus").iterdir())
    character_tokenizer(text).save(folder / "fitting.json")
    character_tokenizer(set(text) - {"e"}).save(folder / "lacking.json")
    character_tokenizer(text, end_of_document=False).save(folder / "endless.json")
    (folder / "torn.json").write_text('{"version": "1.0", "model"')
    assert refused(*prepare("none.json")) == "cannot read the tokenizer none.json: No such file or directory"
    assert "torn.json is not a tokenizer.json that the library tokenizers reads: " in refused(*prepare("torn.json"))
    assert "endless.json has none of the tokens <|endoftext|>, " in refused(*prepare("endless.json"))
    assert works(*prepare("fitting.json"))["vocabulary"] == len(set(text)) + 1
    shutil.rmtree("stores")
    message = refused(*prepare("lacking.json"))
    assert message.startswith("abc.py: the character 'e' (U+0065) is not in the tokenizer's vocabulary")


def test_a_store_of_another_vocabulary(refused: Callable[..., str], works: Callable[..., dict]) -> None:
    works("data", "prepare", "small.yaml")
    larger = ("small.yaml", "data.tokenizer.vocabulary=310")
    assert refused("train", *larger) == (
        "the store stores/small was made from other inputs: data.tokenizer.vocabulary was 300, is 310; "
        "choose another data.store or delete that folder"
    )
    message = refused("train", *larger, "data.sources=[]")
    assert message.startswith("data.tokenizer: the store stores/small was made with ")
    works("data", "prepare", *larger, "data.store=stores/larger")
    message = refused("train", "small.yaml", "data.mixture={stores/small: 1.0, stores/larger: 1.0}")
    assert message.startswith("stores/larger and stores/small have different tokenizers and a mixture needs one")
    assert works("train", "small.yaml")["status"] == "finished"


# The disk


@pytest.fixture
def disk(folder: Path) -> Iterator[Callable[..., Path]]:
    """``disk("size=1m")``: a disk of that kind at ``disk/`` in the folder; once more, to change it."""
    place = folder / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a disk: {done.stderr.strip()}")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    file = place / "filler"
    free = os.statvfs(place)
    file.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return file


def hidden(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if ".aside" in path.name or ".replaced" in path.name]


def test_a_disk_that_is_full_before_the_store_is_made(
    disk: Callable[..., Path], refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    disk("size=64k")
    words = ("small.yaml", "data.store=disk/store")
    message = refused("train", *words)
    assert message == refused("data", "prepare", *words)
    assert message.startswith("the disk is full: cannot write to disk/store.partial")
    assert message.endswith("free some space, and the same command goes on from here")
    disk("size=16m")
    assert works("train", *words)["status"] == "finished"
    assert os.listdir("disk") == ["store"]


def test_a_disk_that_is_full_before_the_run_begins(
    disk: Callable[..., Path], refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    works("data", "prepare", "small.yaml")
    place = disk("size=4m")
    for room in (0, 8192, 40960):  # for nothing; for the recipe; for a part of the first checkpoint
        filler = fill(place, room)
        message = refused("train", "small.yaml", "run=disk/run")
        assert message.startswith("cannot write disk/run")
        assert message.endswith(": the disk is full; free some space and run the same command again")
        assert hidden(place) == []
        filler.unlink()
    assert Run.open("disk/run").facts["status"] == "created"
    assert works("train", "small.yaml", "run=disk/run", "seed=5")["status"] == "finished"  # nothing was begun


def test_a_disk_that_fills_up_in_training(
    disk: Callable[..., Path], refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    undisturbed = works("train", "small.yaml", "run=elsewhere")
    place = disk("size=4m")
    full = "free some space and run the same command again"
    begun = works("train", "small.yaml", "run=disk/run", "training.budget=5 steps")
    needed = sum(file.stat().st_size for file in Path(begun["run"], "checkpoints").rglob("*"))
    shutil.rmtree(begun["run"])
    filler = fill(place, needed + 100_000)  # for two checkpoints, but not for the third beside them
    message = refused("train", "small.yaml", "run=disk/run")
    assert message.startswith("cannot write disk/run/")
    assert full in message
    assert hidden(place) == []
    done = losses("disk/run")
    assert 5 <= len(done) < 40
    assert full in refused("train", "small.yaml", "run=disk/run")
    filler.unlink()
    assert works("train", "small.yaml", "run=disk/run")["loss"] == undisturbed["loss"]
    assert losses("disk/run") == losses("elsewhere")


def test_a_read_only_run_directory(
    disk: Callable[..., Path], refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    disk("size=16m")
    works("train", "small.yaml", "run=disk/done")
    disk("ro")
    readonly = "the file system is read-only; choose a directory that can be written"
    assert refused("train", "small.yaml", "run=disk/run") == f"cannot write disk/run: {readonly}"
    assert refused("train", "small.yaml", "run=disk/done") == f"cannot write disk/done/lock: {readonly}"
    assert refused("data", "prepare", "small.yaml", "data.store=disk/store").startswith("cannot write disk/")
    assert works("sample", "disk/done")  # reading goes on
    disk("rw")
    assert works("train", "small.yaml", "run=disk/run")["status"] == "finished"


# The run directory


def test_a_run_directory_made_by_another_recipe(refused: Callable[..., str], works: Callable[..., dict]) -> None:
    outcome = works("train", "small.yaml")
    words = ("train", "small.yaml", "training.batch=8 samples", "layout.micro_batch=2")
    assert refused(*words) == (
        "runs/small holds another run: training.batch: 4 samples -> 8 samples; "
        "choose another `run=` or delete that directory"
    )
    message = refused("train", "small.yaml", "data.store=stores/other", "data.split.validation=0.2")
    assert message.startswith("runs/small holds another run: data.split.validation: 0.1 -> 0.2; ")
    assert works("train", "small.yaml") == outcome
    assert works(*words, "run=runs/other")["status"] == "finished"


def test_a_folder_of_other_files_as_run_directory(
    folder: Path, refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    works("data", "prepare", "small.yaml")
    before = sorted(path for path in folder.rglob("*"))
    assert refused("train", "small.yaml", "run=corpus").startswith("corpus holds other files (abc.py)")
    assert refused("train", "small.yaml", "run=small.yaml").startswith("small.yaml is a file")
    assert sorted(path for path in folder.rglob("*")) == before


LONG = ("train", "small.yaml", "training.budget=400 steps")


def begin_run(folder: Path, words: tuple[str, ...], steps: int) -> subprocess.Popen[bytes]:
    """The command in a process of its own, once it has done so many steps."""
    process = subprocess.Popen([sys.executable, "-m", "genscale", *words], cwd=folder, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    metrics = folder / "runs" / "small" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.fixture
def killed(folder: Path, works: Callable[..., dict]) -> Path:
    """A run directory whose process was killed."""
    works("data", "prepare", "small.yaml")
    process = begin_run(folder, LONG, steps=20)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return Path("runs/small")


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step-*"))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(
    killed: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    newest, before = checkpoints(killed)[-1], checkpoints(killed)[-2]
    cut(newest / "rank-00000.safetensors")
    code, _, err = call(*LONG)
    assert code == 0
    [warning] = [line for line in err.splitlines() if "is damaged" in line]
    assert warning.startswith(f"checkpoint runs/small/checkpoints/{newest.name} is damaged (rank-00000.safetensors, ")
    events = {event["kind"]: event for event in Run.open(killed).events()}
    assert events["damaged_checkpoint"]["message"] == warning
    assert events["resume"]["step"] == int(before.name.removeprefix("step-"))
    assert len(losses("runs/small")) == 400


def test_no_intact_checkpoint_is_one_clear_line(
    killed: Path, refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    for checkpoint in checkpoints(killed):
        cut(checkpoint / "rank-00000.safetensors")
    message = refused(*LONG)
    assert message.startswith("no intact checkpoint (last was asked for) in runs/small/checkpoints; ")
    assert message.endswith("; delete runs/small/checkpoints to begin anew")
    for checkpoint in checkpoints(killed):
        assert f"checkpoint {checkpoint} is damaged (rank-00000.safetensors, " in message
        (checkpoint / "checksums.json").unlink()
    assert refused(*LONG).startswith("no intact checkpoint")  # and not silently from the beginning
    assert len(checkpoints(killed)) > 1
    shutil.rmtree("runs/small/checkpoints")
    assert works("train", "small.yaml", "training.budget=10 steps")["status"] == "finished"
    assert len(losses("runs/small")) == 10


def test_two_processes_on_one_run_directory(
    folder: Path, refused: Callable[..., str], works: Callable[..., dict]
) -> None:
    works("data", "prepare", "small.yaml")
    same = ("train", "small.yaml", "training.budget=100k steps")
    process = begin_run(folder, same, steps=2)
    try:
        facts = (folder / "runs" / "small" / "facts.json").read_bytes()
        message = f"another process (pid {process.pid} on {os.uname().nodename}) is using runs/small"
        assert refused(*same) == message
        assert refused(*same, "training.log_every=2") == message
        assert refused("train", "small.yaml").startswith("runs/small holds another run: training.budget: ")
        assert process.poll() is None
        assert (folder / "runs" / "small" / "facts.json").read_bytes() == facts
    finally:
        process.kill()
        process.wait()
    with Run.open("runs/small").lock():  # it went with its holder
        pass

"""The commands one after the other on a small corpus, as a user types them."""

import json
import shutil
from pathlib import Path

import pytest

from genscale.cli.main import main

SHAPE = """
extends: tiny
data:
  sources: [corpus/*.py]
  tokenizer: {vocabulary: 300}
model: {layers: 1, width: 16, heads: 1, hidden: 32, context: 16}
training:
  budget: 12 steps
  batch: 4 samples
  validation: {every: 6 steps, amount: 8 samples}
layout: {compile: false, precision: fp32, micro_batch: 4}
sampling: {prompts: ["import "], tokens: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of 40 modules of Python's standard library, and a recipe for it."""
    folder = tmp_path_factory.mktemp("life-cycle")
    (folder / "corpus").mkdir()
    for number, file in enumerate(sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]):
        shutil.copy(file, folder / "corpus" / f"{number:02}.py")
    (folder / "small.yaml").write_text(SHAPE)
    return folder


@pytest.fixture
def call(folder, monkeypatch, capfd):
    """Run a command line in the folder; its standard output, once it ended well."""
    monkeypatch.chdir(folder)

    def call(*words, code=0):
        with pytest.raises(SystemExit) as exit:
            main(words)
        out, err = capfd.readouterr()
        assert (exit.value.code or 0) == code, err
        return out if code == 0 else err

    return call


@pytest.fixture
def trained(call):
    call("train", "small.yaml", "--json")
    return call


def test_prepare_says_what_is_in_the_store_and_report_says_the_same(call, folder):
    made = json.loads(call("data", "prepare", "small.yaml", "--json"))
    assert made == json.loads(call("data", "report", "stores/small", "--verify", "--json"))
    assert made == json.loads(call("data", "prepare", "small.yaml", "--json"))
    assert made["vocabulary"] == 300
    [source] = made["sources"].values()
    files = list((folder / "corpus").iterdir())
    assert source["documents"] == len(files) == sum(split["documents"] for split in made["splits"].values())
    assert source["bytes"] == sum(file.stat().st_size for file in files)
    assert source["tokens"] == sum(split["tokens"] for split in made["splits"].values())
    assert source["licences"] == ["not given"]
    table = call("data", "report", "stores/small")
    assert f"{source['tokens']:,}" in table
    assert made["fingerprint"] in table


def test_a_store_is_used_by_a_recipe_that_names_no_sources(call):
    call("data", "prepare", "small.yaml", "data.store=stores/bare", "--json")
    words = ["small.yaml", "name=bare", "data.sources=[]", "training.budget=6 steps"]
    assert json.loads(call("train", *words, "--json"))["steps"] == 6


def test_train_says_where_the_run_is_and_goes_on_to_the_same_end(call):
    outcome = json.loads(call("train", "small.yaml", "--json"))
    assert (outcome["run"], outcome["status"], outcome["steps"]) == ("runs/small", "finished", 12)
    assert outcome["best_step"] in (6, 12)
    assert 0 < outcome["validation_loss"] < 7
    assert json.loads(call("train", "small.yaml", "--json")) == outcome
    text = call("train", "small.yaml")
    assert text.startswith("runs/small: 12 steps")
    assert "genscale sample runs/small" in text


def test_sample_streams_one_completion_and_lists_several(trained):
    streamed = trained("sample", "runs/small")
    [listed] = json.loads(trained("sample", "runs/small", "--json"))
    assert listed["prompt"] == "import "
    assert streamed == f"import {listed['text']}\n"
    several = json.loads(trained("sample", "runs/small", "--prompt", "a", "--prompt", "b", "--count", "2", "--json"))
    assert [entry["prompt"] for entry in several] == ["a", "a", "b", "b"]
    assert trained("sample", "runs/small", "--prompt", "a", "--count", "2").count("---") >= 2


def test_sample_obeys_its_options(trained):
    def text(*options):
        return json.loads(trained("sample", "runs/small", "--json", *options))[0]["text"]

    assert text("--tokens", "1") == text("--tokens", "1", "--seed", "0") != text("--tokens", "8")
    likeliest = text("--temperature", "0")
    assert likeliest == text("--top-k", "1") == text("--temperature", "0", "--seed", "5", "--checkpoint", "best")
    assert trained("sample", "runs/small", "--checkpoint", "3", code=2).startswith("error: ")


def test_evaluate_scores_the_run_and_its_baselines(trained):
    scores = json.loads(trained("evaluate", "runs/small", "--json"))
    assert scores["perplexity"] == pytest.approx(2.718281828459045 ** scores["loss"])
    assert set(scores["baselines"]) == {"3-gram", "5-gram"}
    lines = trained("evaluate", "runs/small", "--checkpoint", "last").splitlines()
    assert lines[0].startswith("held-out loss")
    assert len(lines) == 5


def test_report_prints_where_it_is(trained, folder):
    path = folder / trained("report", "runs/small").strip()
    assert path.name == "report.html"
    assert path.read_text(encoding="utf-8").lstrip().startswith("<!")


def test_another_recipe_for_the_same_run_is_refused(trained):
    message = trained("train", "small.yaml", "training.budget=20 steps", code=2)
    assert message.splitlines()[-1].startswith(
        "error: runs/small holds another run: training.budget: 12 steps -> 20 steps"
    )


def test_text_that_is_not_given_is_asked_for(call):
    assert "data.sources='[" in call("train", "shakespeare-char", code=2)
    assert "error: data.sources is empty; expected" in call("data", "prepare", "shakespeare-char", code=2)

"""The report: one file that needs no network, true numbers, nothing of a sample taken for markup."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from genscale.recipe.load import recipe_from_mapping
from genscale.reports.report import write_report
from genscale.runs.run import Run
from genscale.runtime.errors import UserError


class Page(HTMLParser):
    """The page's elements, its text outside style and script, and the data behind its charts."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("style", "script"):
            self.text += data

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """Values by step by name, as the pointer reads them."""
        charts = [json.loads(value or "") for name, value in self.attributes if name == "data-curves"]
        return {
            curve["name"]: dict(zip(curve["steps"], curve["values"], strict=True))
            for chart in charts
            for curve in chart["curves"]
        }

    def headlines(self) -> dict[str, str]:
        found = re.findall(r"<dt>(.*?)<sup>.*?</dt><dd>(.*?)</dd>", self.source)
        return {html.unescape(name): html.unescape(value) for name, value in found}


def make_run(folder: Path, **recipe: Any) -> Run:
    values = {"name": "tiny", "run": str(folder / "run"), "data": {"store": str(folder / "store")}, **recipe}
    return Run.create(folder / "run", recipe_from_mapping(values), "0123456789abcdef")


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A finished run of 100 steps, with validation every 20."""
    run = make_run(tmp_path, description="A run for <tests> & such.")
    run.record(
        status="finished",
        stopped_early=True,
        steps=200,
        tokens_per_sample=16,
        samples_per_epoch=1000,
        parameters={"model": 1_234_567},
        flops_per_sample=2.5e9,
        peak={"flops": 4e11, "kind": "measured"},
        device={"kind": "cpu", "name": "A processor", "threads": 2},
        baselines={"3-gram": 2.31, "5-gram": 2.2},
        best={"step": 80, "loss": 2.125},
        inputs={"tokens": {"train": 6400, "validation": 320}, "bytes": {"train": 20_000, "validation": 1000}},
    )
    for step in range(10, 101, 10):
        run.log_metrics(
            step,
            samples=step * 8,
            tokens=step * 128,
            loss=4.0 - step / 64,
            gradient_norm=1.0 + step / 256,
            learning_rate=1e-3,
            tokens_per_second=1000.0 + step,
            utilisation=0.25,
            seconds=float(step),
        )
        if step % 20 == 0:
            run.log_metrics(step, validation_loss=2.125 + abs(step - 80) / 100)
            run.log_sample(step, prompt="def ", text=f"written at {step}")
    run.log_event("resume", "going on from step 50 of 200", step=50)
    return run


def test_the_page_needs_nothing_from_elsewhere(trained: Run) -> None:
    page = Page(write_report(trained))
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert references
    assert all(value and value.startswith("#") for value in references)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http" not in page.source.replace("http-equiv", "")
    assert len(page.source) < 1_000_000


def test_headlines_equal_the_metrics(trained: Run) -> None:
    shown = Page(write_report(trained)).headlines()
    assert shown == {
        "Validation loss": "2.1250",
        "Perplexity": f"{math.exp(2.125):.5g}",
        "Bits per byte": f"{2.125 / math.log(2) * 320 / 1000:.4f}",
        "Tokens seen": "12.8 k",
        "Parameters": "1.23 M",
        "Tokens per second": "1,055",
        "Utilisation": "25.0%",
    }


def test_curves_equal_the_metrics(trained: Run) -> None:
    curves = Page(write_report(trained)).curves
    assert curves["loss"] == {step: 4.0 - step / 64 for step in range(10, 101, 10)}
    assert curves["validation loss"] == {step: 2.125 + abs(step - 80) / 100 for step in range(20, 101, 20)}
    assert curves["learning rate"] == dict.fromkeys(range(10, 101, 10), 1e-3)
    assert set(curves) == {
        "loss",
        "validation loss",
        "learning rate",
        "gradient norm",
        "tokens per second",
        "utilisation",
    }


def test_the_page_tells_the_story(trained: Run) -> None:
    text = Page(write_report(trained)).text
    for expected in (
        "tiny",
        "stopped early",
        "A run for <tests> & such.",
        "step 100 of 200",
        "1:40 of training",
        "best 2.1250",
        "3-gram 2.31",
        "5-gram 2.2",
        "2.00 epochs",
        "of the measured peak",
        "400 GFLOP/s",
        "A processor",
        "0123456789abcdef",
        "going on from step 50 of 200",
        "objective:",  # the recipe
    ):
        assert expected in text, expected


def test_samples_are_the_first_the_middle_and_the_last(trained: Run) -> None:
    text = Page(write_report(trained)).text
    assert [int(step) for step in re.findall(r"written at (\d+)", text)] == [20, 60, 100]


def test_hostile_text_stays_text(trained: Run) -> None:
    hostile = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b[31m\ud800\u202e"
    trained.log_event("warning", hostile.replace("\ud800", ""))
    trained.record(note=hostile.replace("\ud800", ""), baselines={hostile.replace("\ud800", ""): 2.0})
    trained.log_metrics(110, **{hostile.replace("\ud800", ""): 1.0})
    with (trained.directory / "samples.jsonl").open("a") as file:  # as a model may write it: half a surrogate pair too
        print(json.dumps({"step": 110, "prompt": hostile, "text": hostile, "<b>": hostile}), file=file)
    page = Page(write_report(trained))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_a_run_that_has_just_been_made(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    assert "No metrics have been written yet." in page.text
    assert "created" in page.text
    assert page.headlines() == {}


def test_a_run_in_progress_without_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.record(status="running", steps=10)
    run.log_metrics(1, loss=5.5, samples=8, seconds=0.5)
    run.log_metrics(2, loss=math.nan, samples=16, seconds=1.0)
    page = Page(write_report(run))
    assert page.headlines() == {"Training loss": "5.5000", "Samples seen": "16"}
    assert page.curves["loss"] == {1: 5.5, 2: None}


def test_the_best_is_found_in_the_metrics_while_the_run_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.75)):
        run.log_metrics(step, validation_loss=loss)
    page = Page(write_report(run))
    assert page.headlines() == {"Validation loss": "2.5000"}
    assert "best, at step 2" in page.text


def test_another_kind_of_run_needs_no_special_case(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.record(parameters={"discriminator": 1000, "generator": 3000})
    run.log_metrics(1, samples=4, discriminator_loss=0.7, generator_loss=1.1, samples_per_second=2.0)
    run.log_sample(1, image="samples/1.png", label="a shoe")
    page = Page(write_report(run))
    assert {"discriminator loss", "generator loss", "samples per second"} == set(page.curves)
    assert page.headlines() == {"Samples seen": "4", "Parameters": "4 k", "Samples per second": "2"}
    assert "generator 3 k" in page.text
    assert "label: a shoe" in page.text


def test_the_data_is_told_by_source(tmp_path: Path) -> None:
    from genscale.data.prepare import prepare

    for name, count in (("poems", 40), ("letters", 30)):
        (tmp_path / name).mkdir()
        for k in range(count):
            (tmp_path / name / f"{k}.txt").write_text(f"{name} number {k}, café\n")
    sources = [{"path": str(tmp_path / "poems"), "licence": "CC0-1.0"}, {"path": str(tmp_path / "letters")}]
    data = {
        "store": str(tmp_path / "store"),
        "sources": sources,
        "tokenizer": {"kind": "characters"},
        "split": {"validation": 0.2},
    }
    run = make_run(tmp_path, data=data)
    store = prepare(run.recipe, workers=1)
    page = Page(write_report(run))
    rows = re.findall(r"<tr>(.*?)</tr>", page.source)
    cells = [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]
    shown = {row[0]: row[1:] for row in cells if len(row) == 6}
    assert {name: (row[0], int(row[1]) + int(row[2])) for name, row in shown.items()} == {
        str(tmp_path / "poems"): ("CC0-1.0", 40),
        str(tmp_path / "letters"): ("not recorded", 30),
    }
    total = sum(file.stat().st_size for name in ("poems", "letters") for file in (tmp_path / name).iterdir())
    assert sum(int(row[3].replace(",", "")) for row in shown.values()) == total
    tokens = sum(int(row[4].replace(",", "")) for row in shown.values())
    assert tokens == store.tokens("train") + store.tokens("validation")


def test_a_store_that_is_gone_is_said(trained: Run) -> None:
    text = Page(write_report(trained)).text
    assert "By source it is not known: there is no store in" in text
    assert "6,400 train, 320 validation" in text


def test_checkpoints_are_listed(trained: Run) -> None:
    folder = trained.checkpoints / "step-00000080"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(bytes(1_500_000))
    assert "1.5 MB" in (page := Page(write_report(trained))).text
    assert "checkpoints/step-00000080" in page.text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report(Run.open(tmp_path))

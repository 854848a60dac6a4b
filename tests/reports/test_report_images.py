"""What the report shows of a run that learned images."""

import base64
import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genscale.data.image_store import write_image_store
from genscale.generation.grid import png_bytes
from genscale.recipe.load import recipe_from_mapping
from genscale.reports.report import write_report
from genscale.runs.run import Run

CLASSES = ("boot", "<b>bag</b>")


def make_run(folder: Path) -> Run:
    recipe = recipe_from_mapping(
        {
            "run": str(folder / "run"),
            "data": {"kind": "images", "store": str(folder / "store")},
            "model": {"kind": "unet"},
            "objective": {"kind": "flow"},
            "training": {"budget": "100 samples", "batch": "4 samples"},
        }
    )
    return Run.create(folder / "run", recipe, "0123456789abcdef")


def drawn(value: int, size: int = 8) -> bytes:
    return png_bytes(np.full((size, size, 3), value, np.uint8))


def page_of(run: Run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def rows(page: str) -> list[list[str]]:
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return [[html.unescape(cell) for cell in row] for row in found]


def test_the_first_the_middle_and_the_last_grid_stand_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for step in (10, 20, 30, 40, 50):
        run.log_sample(step, image=run.keep_image(step, 0, drawn(step)))
    page = page_of(run)
    assert [int(each[0, 0, 0]) for each in pictures(page)] == [10, 30, 50]
    assert [each.shape for each in pictures(page)] == [(8, 8, 3)] * 3
    assert re.findall(r"<h3>Step ([\d,]+)</h3>", page) == ["10", "30", "50"]
    assert "image-rendering: pixelated" in page
    assert "<pre><b>" not in page  # no empty texts below them
    assert "samples/step" not in page


@pytest.mark.parametrize("name", ["gone.png", "../secret.png", "/etc/hostname", "text.png", "large.png", "", "a\0b"])
def test_what_cannot_be_shown_is_named_and_never_read_from_elsewhere(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    (tmp_path / "secret.png").write_bytes(drawn(1))
    (run.directory / "text.png").write_text("<script>alert(1)</script>")
    (run.directory / "large.png").write_bytes(drawn(1) + bytes(2_000_001))
    run.log_sample(1, image=name)
    page = page_of(run)
    assert pictures(page) == []
    assert f"image: {name}" in page


def test_images_are_counted_as_images(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.record(inputs={"images": {"train": 100, "validation": 10}}, samples_per_epoch=100)
    for step, rate in ((1, 20.0), (2, 24.0), (3, 40.0)):
        run.log_metrics(step, samples=50 * step, loss=1.0, samples_per_second=rate)
    page = page_of(run)
    shown = dict(re.findall(r"<dt>(.*?)<sup>.*?</dt><dd>(.*?)</dd>", page))
    assert shown == {"Training loss": "1.0000", "Images seen": "150", "Images per second": "24"}
    assert "1.50 epochs" in page
    assert "100 train, 10 validation" in page


def test_the_data_is_told_by_source_and_class(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    generator = np.random.default_rng(0)
    images = {
        split: generator.integers(0, 256, (n, 8, 8, 3), np.uint8) for split, n in (("train", 5), ("validation", 3))
    }
    labels = {"train": np.array([0, 1, 1, -1, 1]), "validation": np.array([0, 0, 1])}
    write_image_store(tmp_path / "store", images, labels, CLASSES)
    page = page_of(run)
    assert ["arrays", "not recorded", "5", "3"] in rows(page)
    assert ["boot", "1", "2"] in rows(page)
    assert ["<b>bag</b>", "3", "1"] in rows(page)
    assert ["not recorded", "1", "0"] in rows(page)
    assert "3 x 8 x 8" in page
    assert "<b>bag" not in page


def test_a_store_that_is_gone_or_damaged_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "By source it is not known: there is no store" in page_of(run)
    images = {"train": np.zeros((1, 8, 8, 3), np.uint8), "validation": np.zeros((1, 8, 8, 3), np.uint8)}
    store = write_image_store(tmp_path / "store", images)
    (store.path / "documents.parquet").write_bytes(b"damaged")
    assert "By source it is not known" in page_of(run)


MEASURED: dict[str, Any] = {
    "kernel_distance(classifier, N=5000)": 0.25,
    "kernel_distance(classifier, N=5000, real)": 0.125,
    "label_accuracy(classifier, N=5000)": 0.5,
    "memorisation_suspicious": False,
    "classifier": {"kind": "small", "accuracy": None},
    "closest_pairs": [{"generated": 1}],
}


def test_each_measure_stands_beside_its_floor_and_the_nearest_images_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "Generated images" not in page_of(run)
    run.record(image_evaluation=MEASURED)
    (run.directory / "evaluation").mkdir()
    (run.directory / "evaluation" / "closest-pairs.png").write_bytes(drawn(77))
    page = page_of(run)
    assert ["kernel distance", "classifier, N=5000", "0.25", "0.125"] in rows(page)
    assert ["label accuracy", "classifier, N=5000", "0.5", "–"] in rows(page)
    assert sum(row[0] == "kernel distance" for row in rows(page) if row) == 1
    assert "<th>memorisation suspicious</th><td>no</td>" in page
    assert "<th>classifier accuracy</th><td>–</td>" in page
    assert [int(each[0, 0, 0]) for each in pictures(page)] == [77]
    assert "closest pairs" not in page

"""What a user gets wrong with images, through the real command line: one line on standard error and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genscale.cli.main import main

RECIPE = """\
name: small
data: {kind: images, sources: [photos], resolution: 8, split: {validation: 0.4}}
objective: {kind: flow}
model: {kind: unet}
training: {budget: 100 images, batch: 10 images}
"""
RANDOM = np.random.default_rng(0)


def image(path: Path, height: int = 9, width: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: photos in two classes, and a recipe."""
    for number in range(24):
        image(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png")
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in the folder: exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            main([*words])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        found = capfd.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture
def refused(call: Callable[..., tuple[int, str, str]], folder: Path) -> Callable[..., str]:
    """The one line that a refused ``data prepare`` says; it leaves no store."""

    def run(*overrides: str) -> str:
        code, output, errors = call("data", "prepare", "small.yaml", "--json", *overrides)
        assert (code, output) == (2, "")
        (line,) = errors.splitlines()
        assert line.startswith("error: ")
        assert not (folder / "stores" / "small").exists()
        return line.removeprefix("error: ")

    return run


def test_a_report_counts_by_class_split_and_source(call: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    (folder / "photos" / "dog" / "torn.png").write_bytes(b"\x89PNG")
    (folder / "photos" / "notes.md").write_text("x")
    image(folder / "photos" / "yak" / "1.png")
    code, output, _ = call("data", "prepare", "small.yaml", "data.bad=skip", "--json")
    assert code == 0
    found = json.loads(output)
    assert found["shape"] == [8, 8, 3]
    assert {name: sum(counts.values()) for name, counts in found["classes"].items()} == {"cat": 12, "dog": 12, "yak": 1}
    assert sum(amounts["images"] for amounts in found["splits"].values()) == 25
    assert found["sources"]["photos"]["licences"] == ["not given"]
    assert found["faults"] == [
        {
            "source": "photos",
            "bad": 1,
            "left_out": {".md": 1},
            "notes": ["photos/dog/torn.png: it is not an image that Pillow knows"],
        }
    ]
    assert found["warnings"][0] == "1 classes have fewer than two images: yak"
    code, output, _ = call("data", "report", "stores/small", "--verify")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "8x8x3 pixels" in lines[0]
    assert "class train validation" in lines
    assert any(line.startswith("yak ") for line in lines)
    assert "warning: 1 classes have fewer than two images: yak" in lines
    assert "photos: 1 bad images left out; files that hold no images: 1 .md" in lines


def test_a_missing_source(refused: Callable[..., str]) -> None:
    assert refused("data.sources=[photo]") == (
        "data.sources[0]: there is no file or folder 'photo', did you mean 'photos'?"
    )
    assert refused("data.sources=[]").startswith("data.sources is empty; expected at least one folder, archive")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"Dear Sir or Madam", "it is not an image that Pillow knows"),
        (None, "runcated"),
    ],
)
def test_a_bad_image_stops_or_is_left_out(
    refused: Callable[..., str],
    call: Callable[..., tuple[int, str, str]],
    folder: Path,
    content: bytes | None,
    reason: str,
) -> None:
    image(folder / "photos" / "cat" / "bad.png", 60, 60)
    bad = folder / "photos" / "cat" / "bad.png"
    bad.write_bytes(bad.read_bytes()[:3000] if content is None else content)
    line = refused()
    assert line.startswith("photos/cat/bad.png: ")
    assert reason in line
    assert line.endswith("; data.bad 'skip' leaves such images out")
    assert call("data", "prepare", "small.yaml", "data.bad=skip", "--json")[0] == 0


def test_all_images_bad(refused: Callable[..., str], folder: Path) -> None:
    for number in range(3):
        (folder / f"bad/{number}.jpg").parent.mkdir(exist_ok=True)
        (folder / f"bad/{number}.jpg").write_bytes(b"")
    assert refused("data.bad=skip", "data.sources=[bad]") == (
        "data.sources[0]: 'bad' holds no image that can be read (3 bad, the first is bad/0.jpg: it is empty)"
    )


def test_labelled_and_unlabelled_sources(refused: Callable[..., str], folder: Path) -> None:
    for number in range(4):
        image(folder / "others" / f"{number}.png")
    assert refused("data.sources=[photos, others]") == (
        "data.sources[1]: 'others' has no classes, but 'photos' has; say 'label: null' in the first to learn its "
        "images without a class, or in the others to learn without classes"
    )


def test_labels_of_another_length(refused: Callable[..., str], folder: Path) -> None:
    np.savez(folder / "a.npz", image=np.zeros((6, 8, 8), np.uint8), label=np.zeros(5, int))
    assert refused("data.sources=[a.npz]") == "a.npz, 'label', has 5 labels for the 6 images of 'image'"


def test_a_key_that_is_not_there(refused: Callable[..., str], folder: Path) -> None:
    np.savez(folder / "a.npz", images=np.zeros((6, 8, 8), np.uint8))
    assert refused("data.sources=[a.npz]") == (
        "a.npz: no array 'image' (data.sources[0].image), did you mean 'images'? It has 'images'"
    )


def test_a_folder_without_images(refused: Callable[..., str], folder: Path) -> None:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text("x")
    (folder / "texts" / "b.md").write_text("x")
    assert refused("data.sources=[texts]") == (
        "data.sources[0]: 'texts' holds no images that are known by their ending, but 2 .md"
    )


def test_too_few_images_for_the_split(refused: Callable[..., str], folder: Path) -> None:
    image(folder / "one" / "1.png")
    line = refused("data.sources=[one]")
    assert line.startswith("data.split: none of the 1 images falls into the ")
    assert line.endswith(" split.validation than 0.4, or more images")


def test_an_autoencoder_that_is_none(refused: Callable[..., str], folder: Path) -> None:
    line = refused("data.latents={autoencoder: photos}")
    assert line == (
        f"data.latents.autoencoder: {folder}/photos has no config.json; expected a folder that diffusers' "
        "AutoencoderKL.save_pretrained wrote"
    )


def test_mixed_sizes_modes_and_depths_are_no_mistake(call: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    for number, mode in enumerate(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]):
        Image.new(mode, (5 + 9 * number, 40 - number)).save(folder / "photos" / "cat" / f"mode-{number}.png")
    Image.new("CMYK", (30, 20)).save(folder / "photos" / "cat" / "print.jpg")
    code, output, _ = call("data", "prepare", "small.yaml", "--json")
    assert code == 0
    assert sum(amounts["images"] for amounts in json.loads(output)["splits"].values()) == 32

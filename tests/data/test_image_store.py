from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genscale.data.description import ImageDescription, load_description
from genscale.data.image_store import ImageStore, documents_schema, write_image_store
from genscale.data.manifest import kind_of
from genscale.data.store import Store, write_store
from genscale.data.tokenizer import character_tokenizer
from genscale.runtime.errors import UserError

RANDOM = np.random.default_rng(0)
IMAGES = {
    "train": RANDOM.integers(0, 256, (7, 4, 4, 3), np.uint8),
    "validation": RANDOM.integers(0, 256, (2, 4, 4, 3), np.uint8),
}
LABELS = {"train": [0, 1, 1, -1, 0, 1, 0], "validation": [1, 0]}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return write_image_store(tmp_path / "s", IMAGES, LABELS, ("cat", "dog"), shard_images=3)


def test_numpy_and_pyarrow_read_it_by_themselves(store: ImageStore) -> None:
    assert sorted(file.name for file in store.path.iterdir()) == [
        "documents.parquet",
        "images.json",
        "manifest.json",
        "train-00000.npy",
        "train-00001.npy",
        "train-00002.npy",
        "train-labels.npy",
        "validation-00000.npy",
        "validation-labels.npy",
    ]
    shards = [np.load(store.path / f"train-{number:05d}.npy") for number in range(3)]
    assert [shard.shape for shard in shards] == [(3, 4, 4, 3), (3, 4, 4, 3), (1, 4, 4, 3)]
    assert np.array_equal(np.concatenate(shards), IMAGES["train"])
    assert np.load(store.path / "train-labels.npy").tolist() == LABELS["train"]
    table = pq.read_table(store.path / "documents.parquet")
    assert table.schema.names == documents_schema().names
    assert table["id"].to_pylist() == list(range(9))
    assert table["index"].to_pylist() == [*range(7), 0, 1]
    assert table["class"].to_pylist()[:4] == ["cat", "dog", "dog", None]


def test_opening_gives_memory_mapped_arrays(store: ImageStore) -> None:
    opened = ImageStore.open(store.path)
    assert kind_of(store.path) == "images"
    assert opened.described == ImageDescription(3, 4, ("cat", "dog"))
    assert (opened.images("train"), opened.images("validation"), opened.shape) == (7, 2, (4, 4, 3))
    assert all(isinstance(shard, np.memmap) for shard in opened.shards("train"))
    assert isinstance(opened.labels("train"), np.memmap)
    assert opened.captions("train") is None
    assert opened.tokenizer is None
    opened.verify()


def test_what_sampling_needs_is_kept_with_a_run(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    store.keep_with(tmp_path / "run")
    assert load_description(tmp_path / "run") == store.described


def test_the_fingerprint_is_of_all_that_is_in_the_store(tmp_path: Path) -> None:
    def fingerprint(name: str, images: dict = IMAGES, labels: dict = LABELS, classes=("cat", "dog"), shard=3) -> str:
        return write_image_store(tmp_path / name, images, labels, classes, shard_images=shard).fingerprint

    same = fingerprint("a")
    assert fingerprint("b") == same
    other = {**IMAGES, "train": IMAGES["train"] ^ np.uint8(1)}
    different = [
        fingerprint("c", images=other),  # a pixel
        fingerprint("d", labels={**LABELS, "validation": [1, 1]}),  # a label
        fingerprint("e", classes=("cat", "cow")),  # a name
        fingerprint("f", shard=4),  # the files
    ]
    assert len({same, *different}) == 5


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        ImageStore.open(path).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_store_of_the_other_kind_is_told(store: ImageStore, tmp_path: Path) -> None:
    write_store(tmp_path / "text", {"train": [[0, 1]]}, character_tokenizer("ab"))
    assert refusal(tmp_path / "text") == f"the store {tmp_path}/text holds text, expected images"
    with pytest.raises(UserError, match="holds images, expected text"):
        Store.open(store.path)
    assert refusal(tmp_path / "no") == f"there is no store in {tmp_path}/no; 'genscale data prepare RECIPE' makes it"


@pytest.mark.parametrize("name", ["train-00001.npy", "train-labels.npy", "documents.parquet", "images.json"])
def test_verify_finds_a_single_wrong_byte(store: ImageStore, name: str) -> None:
    content = bytearray((store.path / name).read_bytes())
    content[-3] ^= 1
    (store.path / name).write_bytes(content)
    assert refusal(store.path).startswith(f"{store.path}/{name} is damaged: its checksum is ")


def test_a_torn_shard_and_a_missing_one(store: ImageStore) -> None:
    (store.path / "train-00000.npy").write_bytes((store.path / "train-00000.npy").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train-00000\.npy is damaged"):
        store.shards("train")
    (store.path / "train-00000.npy").unlink()
    with pytest.raises(UserError, match=r"train-00000\.npy is missing from the store"):
        store.shards("train")


def test_write_image_store_never_overwrites(store: ImageStore) -> None:
    with pytest.raises(UserError, match="exists"):
        write_image_store(store.path, IMAGES)


def test_the_documentation_names_every_column_and_key(store: ImageStore) -> None:
    text = (
        (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8").split("## A store of images")[1]
    )
    assert all(f"| `{name}` | {kind} |" in text for name, kind in zip(
        documents_schema().names, map(str, documents_schema().types), strict=True
    ))  # fmt: skip
    shared = {"format", "fingerprint", "kind", "dtype", "documents", "splits", "made", "files"}
    assert all(f"`{key}`" in text for key in store.manifest.keys() - shared)


def test_the_example_of_the_documentation(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8").split("## A store of images")[1]
    )
    example = text.split("```python\n")[1].split("```")[0]
    exec(example.replace("stores/fashion-mnist", str(store.path)), {})
    assert capsys.readouterr().out == "arrays train cat (4, 4, 3)\n"

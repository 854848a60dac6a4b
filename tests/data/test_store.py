from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data.store import ArrayFile, Store, StoreWriter, documents_schema, token_dtype, write_store
from genscale.data.tokenizer import Tokenizer, character_tokenizer
from genscale.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return character_tokenizer("abcdefgh")


TRAIN = [[0, 1, 2, 8], [3, 8], [4, 5, 6, 7, 8], [1, 1, 8]]
VALIDATION = [[7, 7, 8]]


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    return write_store(tmp_path / "s", {"train": TRAIN, "validation": VALIDATION}, tokenizer, shard_tokens=6)


def test_numpy_and_pyarrow_read_it_by_themselves(store: Store) -> None:
    names = sorted(file.name for file in store.path.iterdir())
    assert names == [
        "documents.parquet",
        "manifest.json",
        "tokenizer.json",
        "train-00000.npy",
        "train-00001.npy",
        "train-00002.npy",
        "train-documents.npy",
        "validation-00000.npy",
        "validation-documents.npy",
    ]
    shards = [np.load(store.path / f"train-{i:05d}.npy") for i in range(3)]
    assert [len(shard) for shard in shards] == [6, 6, 2]
    assert np.concatenate(shards).tolist() == list(chain(*TRAIN))
    assert np.load(store.path / "train-documents.npy").tolist() == [0, 4, 6, 11]
    table = pq.read_table(store.path / "documents.parquet")
    assert table.schema.names == documents_schema().names
    assert table["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["split"].to_pylist() == ["train"] * 4 + ["validation"]
    assert table["start"].to_pylist() == [0, 4, 6, 11, 0]
    assert table["tokens"].to_pylist() == [4, 2, 5, 3, 3]
    assert table["size"].to_pylist() == [3, 1, 4, 2, 2]


def test_opening_gives_memory_mapped_arrays(store: Store) -> None:
    opened = Store.open(store.path)
    assert (opened.tokens("train"), opened.tokens("validation"), opened.bytes("train")) == (14, 3, 10)
    assert all(isinstance(shard, np.memmap) for shard in opened.shards("train"))
    assert opened.dtype == np.uint16 == opened.shards("train")[0].dtype
    assert np.concatenate(opened.shards("train")).tolist() == list(chain(*TRAIN))
    assert isinstance(opened.document_starts("train"), np.memmap)
    assert opened.document_starts("train").dtype == np.int64
    assert opened.tokenizer.fingerprint == store.tokenizer.fingerprint
    assert opened.documents().num_rows == 5
    opened.verify()


def test_a_split_may_be_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write_store(tmp_path / "s", {"train": TRAIN}, tokenizer)
    assert (store.shards("validation"), len(store.document_starts("validation"))) == ([], 0)


def test_the_fingerprint_is_of_all_that_is_in_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def fingerprint(name: str, train: list[list[int]], made_by: Tokenizer = tokenizer, **options: int) -> str:
        return write_store(tmp_path / name, {"train": train}, made_by, **options).fingerprint

    same = fingerprint("a", TRAIN)
    assert fingerprint("b", TRAIN) == same
    different = [
        fingerprint("c", [*TRAIN[:-1], [1, 2, 8]]),  # a token
        fingerprint("d", [[0, 1, 2], [8, 3, 8], *TRAIN[2:]]),  # a boundary
        fingerprint("e", TRAIN, character_tokenizer("abcdefgi")),  # the tokenizer
        fingerprint("f", TRAIN, shard_tokens=5),  # the files
    ]
    assert len({same, *different}) == 5


def test_the_fingerprint_does_not_depend_on_how_the_parts_came(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A unit that brings many documents, or each document by itself."""
    one = write_store(tmp_path / "one", {"train": TRAIN, "validation": VALIDATION}, tokenizer)
    rows = one.documents().to_pylist()
    (tmp_path / "many").mkdir()
    writer = StoreWriter(tmp_path / "many", tokenizer, 100_000_000)
    tokens = [("train", np.array(list(chain(*TRAIN)))), ("validation", np.array(list(chain(*VALIDATION))))]
    writer.add(tokens, [pa.Table.from_pylist(rows[:2]), pa.Table.from_pylist(rows[2:])])
    assert writer.finish({})["fingerprint"] == one.fingerprint


@pytest.mark.parametrize(("vocabulary", "expected"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_smallest_type_that_holds_the_vocabulary(vocabulary: int, expected: str) -> None:
    assert token_dtype(vocabulary) == expected


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(map(chr, range(0x10000, 0x21000)))
    store = write_store(tmp_path / "s", {"train": [[0, 65_536, tokenizer.size - 1]]}, tokenizer)
    assert store.dtype == np.uint32
    assert store.shards("train")[0].tolist() == [0, 65_536, tokenizer.size - 1]


def test_an_array_file_grows_to_any_length(tmp_path: Path) -> None:
    file = ArrayFile(tmp_path / "a.npy", np.dtype(np.int64))
    for length in (0, 1, 999, 12_345):
        file.append(np.arange(length))
    file.finish()
    loaded = np.load(tmp_path / "a.npy")
    assert loaded.tolist() == [*range(1), *range(999), *range(12_345)]


# What may be wrong


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Store.open(path).verify()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_store(tmp_path: Path) -> None:
    assert refusal(tmp_path / "s") == f"there is no store in {tmp_path}/s; 'genscale data prepare RECIPE' makes it"


def test_an_unfinished_store(tmp_path: Path) -> None:
    (tmp_path / "s.partial").mkdir()
    assert refusal(tmp_path / "s") == (
        f"the store {tmp_path}/s is not finished; run 'genscale data prepare RECIPE' again and it goes on"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "{}"])
def test_a_damaged_manifest(store: Store, content: str) -> None:
    (store.path / "manifest.json").write_text(content)
    assert refusal(store.path).startswith(f"{store.path}/manifest.json is damaged; delete the folder {store.path}")


def test_a_manifest_that_lacks_something(store: Store) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    del manifest["splits"]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(store.path).startswith(f"{store.path}/manifest.json lacks splits; delete the folder")


def test_a_store_of_another_format(store: Store) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "store format 99 is not known here, expected 1" in refusal(store.path)


@pytest.mark.parametrize("name", ["train-00001.npy", "train-documents.npy", "documents.parquet", "tokenizer.json"])
def test_verify_finds_a_single_wrong_byte(store: Store, name: str) -> None:
    content = bytearray((store.path / name).read_bytes())
    content[-3] ^= 1
    (store.path / name).write_bytes(content)
    assert refusal(store.path).startswith(f"{store.path}/{name} is damaged: its checksum is ")


def test_a_missing_file(store: Store) -> None:
    (store.path / "train-00001.npy").unlink()
    assert refusal(store.path).startswith(f"{store.path}/train-00001.npy is missing from the store")
    with pytest.raises(UserError, match=r"train-00001\.npy is missing"):
        store.shards("train")


def test_a_torn_shard(store: Store) -> None:
    (store.path / "train-00000.npy").write_bytes((store.path / "train-00000.npy").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train-00000\.npy is damaged"):
        store.shards("train")


def test_an_unknown_split(store: Store) -> None:
    with pytest.raises(UserError, match="has no split 'test', expected one of"):
        store.tokens("test")


def test_write_store_never_overwrites(store: Store, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="exists"):
        write_store(store.path, {"train": TRAIN}, tokenizer)


def test_the_example_of_the_documentation(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    exec(example.replace("stores/tiny", str(store.path)), {})
    assert capsys.readouterr().out == "tokens train None\nabc\n"


def test_the_documentation_names_every_column_and_key(store: Store) -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {kind} |" in text for name, kind in zip(
        documents_schema().names, map(str, documents_schema().types), strict=True
    ))  # fmt: skip
    assert all(f"`{key}`" in text for key in store.manifest)

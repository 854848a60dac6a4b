from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from genscale.data import formats
from genscale.data.documents import content_hash
from genscale.data.formats import Intake, Piece, Report, read
from genscale.data.sources import list_files
from genscale.recipe.data import Source
from genscale.runtime.errors import UserError

ODD = ["plain", 'naïve, "quoted"\nand broken', "日本語 👩‍👩‍👧", "tab\tand\r\nreturn", "\x00\u2028\ufeff"]


def texts(path: Path, undecodable: str = "replace", damaged: str = "fail", **source: str) -> tuple[list[str], Report]:
    """The documents of a file, and what became of the rest."""
    (file,) = list_files([Source(path=str(path), **source)])  # type: ignore[arg-type]
    report = Report()
    documents = list(read(Piece(file), Intake(undecodable, damaged, report)))
    found = ["".join(document.blocks()) for document in documents]
    assert [document.hash for document in documents] == [content_hash(text.encode()) for text in found]
    assert [document.characters for document in documents] == [len(text) for text in found]
    return found, report


def refusal(path: Path, **rules: str) -> str:
    with pytest.raises(UserError) as caught:
        texts(path, **rules)
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufeff# one\r\ntwo\n".encode())
    assert texts(tmp_path / "a.md") == (["# one\r\ntwo\n"], Report())


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + jsonl([{"body": text, "n": 1} for text in ODD]) + b"\n  \n")
    assert texts(file, text="body")[0] == ODD


def test_jsonl_positions_are_byte_offsets(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"text": text} for text in ODD]))
    (listed,) = list_files([Source(path=str(file))])
    content = file.read_bytes()
    for document in read(Piece(listed), Intake("fail", "fail", Report())):
        line = content[document.position :].split(b"\n", 1)[0]
        assert json.loads(line)["text"] == "".join(document.blocks())


def test_ranges_of_jsonl_give_each_line_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"text": f"{i}" * (i % 7 + 1)} for i in range(50)]))
    (listed,) = list_files([Source(path=str(file))])
    size = file.stat().st_size
    whole = [document.position for document in read(Piece(listed), Intake("fail", "fail", Report()))]
    assert len(whole) == 50
    for step in (1, 13, 20, 21, 22, 64, 1000):
        pieces = [Piece(listed, start, min(start + step, size)) for start in range(0, size, step)]
        found = [d.position for piece in pieces for d in read(piece, Intake("fail", "fail", Report()))]
        assert found == whole


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv(tmp_path: Path, ending: str, delimiter: str) -> None:
    file = tmp_path / f"a.{ending}"
    with open(file, "w", encoding="utf-8", newline="") as opened:
        rows = csv.writer(opened, delimiter=delimiter)
        rows.writerow(["id", "text"])
        rows.writerows([number, text] for number, text in enumerate([*ODD, "x" * 200_000]))
    assert texts(file)[0] == [*ODD, "x" * 200_000]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([text.encode() for text in ODD], kind) if kind == pa.binary() else pa.array(ODD).cast(kind)
    pq.write_table(pa.table({"text": column, "n": range(len(ODD))}), tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet")[0] == ODD


def test_row_groups_of_parquet_can_be_read_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{i}" for i in range(10)]}), tmp_path / "a.parquet", row_group_size=3)
    (file,) = list_files([Source(path=str(tmp_path / "a.parquet"))])
    documents = list(read(Piece(file, 1, 3), Intake("fail", "fail", Report())))
    assert [(d.position, "".join(d.blocks())) for d in documents] == [(i, f"{i}") for i in range(3, 9)]


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: b"".join(
        zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in (content[:100], content[100:])
    ),
}


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed(tmp_path: Path, ending: str) -> None:
    content = jsonl([{"text": text * 50} for text in ODD])
    (tmp_path / f"a.jsonl.{ending}").write_bytes(COMPRESSORS[ending](content))
    (tmp_path / f"b.txt.{ending}").write_bytes(COMPRESSORS[ending](content))
    assert texts(tmp_path / f"a.jsonl.{ending}")[0] == [text * 50 for text in ODD]
    assert texts(tmp_path / f"b.txt.{ending}")[0] == [content.decode()]


# A text too long to be held in memory


def long_text() -> str:
    return "".join(f"line {i}: é {'日本' * (i % 5)}\n\n    indented {i * i}\n" for i in range(60_000))


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_a_long_text_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    content = "\ufeff" + long_text()
    raw = content.encode()
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(raw, 1) if ending.endswith("gz") else raw)
    whole, _ = texts(tmp_path / f"a.{ending}")
    monkeypatch.setattr(formats, "LONG", 100_000)
    (file,) = list_files([Source(path=str(tmp_path / f"a.{ending}"))])
    (document,) = read(Piece(file), Intake("fail", "fail", Report()))
    blocks = list(document.blocks())
    assert "".join(blocks) == content[1:] == whole[0]
    assert len(blocks) > 2
    assert max(len(block.encode()) for block in blocks) <= 1 << 20
    assert document.hash == content_hash(raw[3:])
    assert document.characters == len(content) - 1
    assert list(document.blocks()) == blocks


@pytest.mark.parametrize("policy", ["replace", "drop"])
def test_undecodable_bytes_in_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    raw = long_text().encode().replace(b"line 50000:", b"line \xff\xfe:")
    (tmp_path / "a.txt").write_bytes(raw)
    monkeypatch.setattr(formats, "LONG", 100_000)
    found, report = texts(tmp_path / "a.txt", undecodable=policy)
    assert found == ([raw.decode(errors="replace")] if policy == "replace" else [])
    assert (report.undecodable, report.dropped) == (1, int(policy == "drop"))
    assert report.notes == [f"{tmp_path}/a.txt: not UTF-8 from byte {raw.index(bytes([255]))} on"]


# Undecodable bytes


def undecodable_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """By format: a file with one good and one bad document, and how the bad one is named."""
    (folder / "bad.txt").write_bytes(b"caf\xe9!")
    (folder / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9!"}\n')
    (folder / "a.csv").write_bytes(b"text\ngood\ncaf\xe9!\n")
    table = pa.table({"text": pa.array([b"good", b"caf\xe9!"], pa.binary())})
    pq.write_table(table, folder / "a.parquet")
    return {
        "text": (folder / "bad.txt", "bad.txt"),
        "jsonl": (folder / "a.jsonl", "a.jsonl, line 2"),
        "csv": (folder / "a.csv", "a.csv, line 3"),
        "parquet": (folder / "a.parquet", "a.parquet, row 1"),
    }


@pytest.mark.parametrize("format", ["text", "jsonl", "csv", "parquet"])
def test_undecodable_bytes(tmp_path: Path, format: str) -> None:
    file, name = undecodable_files(tmp_path)[format]
    good = [] if format == "text" else ["good"]
    found, report = texts(file, undecodable="replace")
    assert found == [*good, "caf\ufffd!"]
    assert (report.undecodable, report.dropped) == (1, 0)
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"{tmp_path}/{name}: not UTF-8 from byte ")
    found, report = texts(file, undecodable="drop")
    assert (found, report.undecodable, report.dropped) == (good, 1, 1)
    message = refusal(file, undecodable="fail")
    assert message.startswith(f"{tmp_path}/{name}: not UTF-8 from byte ")
    assert message.endswith("data.undecodable 'replace' puts U+FFFD there, 'drop' leaves the document out")


def test_half_a_surrogate_in_json_is_undecodable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}' + "\n")
    found, report = texts(tmp_path / "a.jsonl")
    assert (found, report.undecodable) == (["a\ufffd\ufffd\ufffdb"], 1)


# Damage


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_compressed_stream_that_ends_early(tmp_path: Path, ending: str) -> None:
    lines = jsonl([{"text": f"document {i} " + "".join(chr(97 + i * j % 26) for j in range(999))} for i in range(999)])
    whole = COMPRESSORS[ending](lines)
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(whole[: len(whole) * 2 // 3])
    assert refusal(file).startswith(f"{file}: damaged (its {ending} stream: ")
    found, report = texts(file, damaged="drop")
    assert report.damaged == 1
    assert report.notes[0].startswith(f"{file}: damaged (its {ending} stream: ")
    assert found == [json.loads(line)["text"] for line in lines.splitlines()[: len(found)]]
    assert len(found) < 999


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_compressed_stream_with_wrong_bytes(tmp_path: Path, ending: str) -> None:
    content = bytearray(COMPRESSORS[ending](bytes(range(33, 127)) * 5000))
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff\x00" * 4
    file = tmp_path / f"a.txt.{ending}"
    file.write_bytes(content)
    assert "damaged (" in refusal(file)
    found, report = texts(file, damaged="drop")
    assert (found, report.damaged) == ([], 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "torn', "not JSON: Invalid control character at: line 1 column 15"),
        (b"[1, 2]", "a JSON list instead of an object"),
        (b'{"text": 5}', "its 'text' is a int instead of a string"),
        (
            b'{"txet": "x", "id": 1}',
            "no key 'text' (data.sources[0].text), did you mean 'txet'? It has 'txet', 'id'",
        ),
    ],
)
def test_damaged_jsonl_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    message = refusal(file)
    assert message.startswith(f"{file}, line 3: damaged ({reason}")
    assert message.endswith("data.damaged 'drop' leaves it out")
    found, report = texts(file, damaged="drop")
    assert (found, report.damaged) == (["one", "two"], 1)
    assert report.notes[0].startswith(f"{file}, line 3: damaged ({reason}")


def test_damaged_csv_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('id,text\n1,one\n2\n3,"three"x\n4,four\n')
    assert refusal(file) == (
        f"{file}, line 3: damaged (1 columns, but 'text' is column 2); data.damaged 'drop' leaves it out"
    )
    found, report = texts(file, damaged="drop")
    assert (found, report.damaged) == (["one", "four"], 2)
    assert report.notes[1].startswith(f"{file}, line 4: damaged (")


def damaged_parquet(folder: Path) -> Path:
    """Row group 1 of three has its bytes overwritten."""
    file = folder / "a.parquet"
    table = pa.table({"text": [f"document {i} " * 40 for i in range(30)]})
    pq.write_table(table, file, row_group_size=10, use_dictionary=False, compression="zstd", write_page_checksum=True)
    metadata = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    end = metadata.data_page_offset + metadata.total_compressed_size
    content[end - 20 : end] = bytes(20)
    file.write_bytes(content)
    return file


def test_a_damaged_parquet_row_group(tmp_path: Path) -> None:
    file = damaged_parquet(tmp_path)
    message = refusal(file)
    assert message.startswith(f"{file}, row group 1 from row 10 on: damaged (")
    assert message.endswith("data.damaged 'drop' leaves it out")
    found, report = texts(file, damaged="drop")
    assert found == [f"document {i} " * 40 for i in (*range(10), *range(20, 30))]
    assert report.damaged == 1
    assert report.notes[0].startswith(f"{file}, row group 1 from row 10 on: damaged (")


def test_a_parquet_file_without_its_end(tmp_path: Path) -> None:
    file = damaged_parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(file).startswith(f"{file}: damaged (")
    found, report = texts(file, damaged="drop")
    assert (found, report.damaged) == ([], 1)


# Columns


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet", text="contents") == (
        f"{tmp_path}/a.parquet: no column 'contents' (data.sources[0].text), did you mean 'content'? "
        "It has 'content', 'id'"
    )
    (tmp_path / "a.csv").write_text("content,id\nx,1\n")
    assert "no column 'text' (data.sources[0].text)" in refusal(tmp_path / "a.csv")


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == f"{tmp_path}/a.parquet: column 'text' is int64, expected string"


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": ""}, {"text": "x"}, {"text": None}]))
    found, report = texts(tmp_path / "a.jsonl")
    assert (found, report.empty, report.damaged) == (["x"], 2, 0)
    (tmp_path / "a.txt").write_bytes(b"")
    assert texts(tmp_path / "a.txt") == ([], Report(empty=1))

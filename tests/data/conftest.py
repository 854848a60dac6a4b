"""A corpus in every format, and units so small that it is worth several workers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import SOURCES


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small units, so that a small corpus is worth several workers."""
    for module_name, name, value in (
        ("text_prepare", "UNIT", 100_000),
        ("units", "UNIT", 100_000),
        ("units", "LONG", 600_000),
        ("preparation", "_SMALL", 0),
    ):
        monkeypatch.setattr(f"genscale.data.{module_name}.{name}", value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in every format: the same text in different ones, empty ones, bytes that are not UTF-8, a long text."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [file.read_text(encoding="utf-8") for file in SOURCES]
    for file, text in zip(SOURCES[:10], texts[:10], strict=True):
        (folder / file.name).write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 9)
    rows = [{"text": text, "id": i} for i, text in enumerate(texts[5:25])]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=4)
    pieces = "".join(text for _ in range(12) for text in texts[:30:3])
    (folder / "long.txt").write_text(pieces.replace("self", "this"))
    assert (folder / "long.txt").stat().st_size > 2_500_000
    return folder

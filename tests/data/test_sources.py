from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import json
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data import huggingface, units
from genscale.data.formats import Intake, Piece, Report, read
from genscale.data.sources import SourceFile, list_files
from genscale.recipe.data import Source, TextData
from genscale.runtime.errors import UserError


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


def paths(*sources: Source) -> list[str]:
    return [file.path for file in list_files(sources)]


def test_a_folder_is_listed_by_path_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, b_txt="b", a__z_txt="z", a__c_md="c")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    assert paths(Source(path=str(tmp_path))) == ["a/c.md", "a/z.txt", "b.txt"]


def test_sources_keep_the_order_of_the_recipe_and_their_licence(tmp_path: Path) -> None:
    write(tmp_path, one_txt="1", two_txt="22")
    files = list_files([Source(path=str(tmp_path / "two.txt"), licence="MIT"), Source(path=str(tmp_path / "one.txt"))])
    assert [(file.source, file.path, file.size, file.licence) for file in files] == [
        (0, "two.txt", 2, "MIT"),
        (1, "one.txt", 1, None),
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.txt", ["deep/er/c.txt", "deep/b.txt", "a.txt"]),
        ("*.txt", ["a.txt"]),
        ("deep/**/*", ["b.md", "b.txt", "er/c.txt"]),
        ("?.txt", ["a.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    write(tmp_path, a_txt="a", deep__b_txt="b", deep__b_md="b", deep__er__c_txt="c")
    assert paths(Source(path=f"{tmp_path}/{pattern}")) == sorted(expected)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, corpus__x_txt="x")
    assert paths(Source(path="~/corpus/**/*.txt")) == ["x.txt"]
    assert paths(Source(path="~/corpus")) == ["x.txt"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["*.md"], ["a.txt", "sub/c.txt", "sub/deep/d.txt"]),
        (["sub/*"], ["a.txt", "sub/deep/d.txt"]),
        (["sub/**"], ["a.txt"]),
        (["**/d.txt", "[ab].txt"], ["sub/b.md", "sub/c.txt"]),
    ],
)
def test_excluded_globs(tmp_path: Path, exclude: list[str], left: list[str]) -> None:
    write(tmp_path, a_txt="a", sub__b_md="b", sub__c_txt="c", sub__deep__d_txt="d")
    assert paths(Source(path=str(tmp_path), exclude=tuple(exclude))) == left


@pytest.mark.parametrize(
    ("name", "format", "compression"),
    [
        ("a.py", "text", None),
        ("a.JSONL.gz", "jsonl", "gz"),
        ("a.ndjson.zst", "jsonl", "zst"),
        ("a.tsv.xz", "csv", "xz"),
        ("a.parquet", "parquet", None),
        ("a.gz", "text", "gz"),
    ],
)
def test_the_format_is_told_by_the_ending(tmp_path: Path, name: str, format: str, compression: str | None) -> None:
    (tmp_path / name).write_bytes(b"")
    (file,) = list_files([Source(path=str(tmp_path / name))])
    assert (file.format, file.compression) == (format, compression)


def test_a_given_format_wins_over_the_ending(tmp_path: Path) -> None:
    (tmp_path / "lines.log").write_text("{}")
    (file,) = list_files([Source(path=str(tmp_path / "lines.log"), format="jsonl")])
    assert file.format == "jsonl"


def test_the_version_changes_when_the_file_does(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one")
    source = Source(path=str(tmp_path))
    before = list_files([source])
    assert list_files([source]) == before
    import os

    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert list_files([source]) != before


def test_the_standard_library_without_installed_packages() -> None:
    files = list_files([Source(path="python:stdlib")])
    listed = {file.path for file in files}
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= listed
    assert not any("site-packages" in path or path.startswith("encodings/") for path in listed)
    assert all(path.endswith(".py") for path in listed)
    assert {file.licence for file in files} == {"PSF-2.0"}
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all((root / file.path).stat().st_size == file.size for file in files)


# Other file systems


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_memory_files_folders_and_globs(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md"):
        memory.pipe(f"/corpus/{name}", name.encode())
    assert paths(Source(path="memory://corpus")) == ["a.txt", "b.txt", "sub/c.txt", "sub/d.md"]
    assert paths(Source(path="memory://corpus/**/*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    (file,) = list_files([Source(path="memory://corpus/sub/c.txt")])
    assert (file.path, file.size, file.open().read()) == ("c.txt", 9, b"sub/c.txt")


class QuietServer(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(functools.partial(QuietServer, directory=str(tmp_path))) as url:
        yield url


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_http(server: str, tmp_path: Path) -> None:
    write(tmp_path, texts__a_txt="from the server")
    (file,) = list_files([Source(path=f"{server}/texts/a.txt")])
    assert (file.path, file.size) == ("a.txt", 15)
    with file.open() as opened:
        assert opened.read() == b"from the server"


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_server_that_gives_no_ranges(server: str, tmp_path: Path, ending: str) -> None:
    """As Python's own: larger files can only be read from the beginning."""
    rows = [f"document {number}: " + "x" * 1000 for number in range(8000)]
    if ending == "parquet":
        pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    else:
        lines = rows if ending == "txt" else [json.dumps({"text": row}) for row in rows]
        (tmp_path / f"a.{ending}").write_text("\n".join(lines))
    (file,) = list_files([Source(path=f"{server}/a.{ending}")])
    assert not file.ranges
    (unit,) = units.plan([file], {}, TextData())
    (piece,) = unit.pieces
    found = ["".join(document.blocks()) for document in read(piece, Intake("fail", "fail", Report()))]
    assert found == (["\n".join(rows)] if ending == "txt" else rows)


def test_a_server_that_breaks_off(tmp_path: Path) -> None:
    class Breaking(QuietServer):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"only this")

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()

    with serving(Breaking) as url:
        (file,) = list_files([Source(path=f"{url}/a.txt")])
        with pytest.raises(UserError, match=r"cannot read http://.*/a\.txt: .*"):
            list(read(Piece(file), Intake("fail", "drop", Report())))


def test_http_glob(server: str, tmp_path: Path) -> None:
    write(tmp_path, texts__a_txt="a", texts__b_txt="b", texts__c_md="c")
    assert paths(Source(path=f"{server}/texts/*.txt")) == ["a.txt", "b.txt"]


# What a user gets wrong


def refusal(*sources: Source) -> str:
    with pytest.raises(UserError) as caught:
        list_files(sources)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_sources() -> None:
    assert refusal() == ("data.sources is empty; expected at least one file, folder, glob, URL, or 'python:stdlib'")


def test_missing_source_is_named_with_its_nearest(tmp_path: Path) -> None:
    write(tmp_path, corpus_txt="x")
    present, missing = Source(path=str(tmp_path / "corpus.txt")), Source(path=str(tmp_path / "corpsu.txt"))
    assert refusal(present, missing) == (
        f"data.sources[1]: there is no file or folder '{tmp_path}/corpsu.txt', did you mean 'corpus.txt'?"
    )


def test_glob_without_a_match(tmp_path: Path) -> None:
    assert refusal(Source(path=f"{tmp_path}/*.txt")) == f"data.sources[0]: '{tmp_path}/*.txt' matches no file"


def test_everything_excluded(tmp_path: Path) -> None:
    write(tmp_path, a_txt="x")
    message = refusal(Source(path=str(tmp_path), exclude=("*",)))
    assert message == f"data.sources[0]: '{tmp_path}' matches no file, all of them excluded by its 'exclude'"


def test_missing_remote_files(server: str, memory: fsspec.AbstractFileSystem) -> None:
    url = f"{server}/nothing.txt"
    assert refusal(Source(path=url)) == f"data.sources[0]: cannot read '{url}': it does not exist"
    assert "data.sources[0]: cannot read 'memory://no/file.txt'" in refusal(Source(path="memory://no/file.txt"))


def test_unknown_protocol() -> None:
    assert "cannot read 'ftpx://a/b'" in refusal(Source(path="ftpx://a/b"))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("x")
    (file,) = list_files([Source(path=str(tmp_path / "gone.txt"))])
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(UserError, match=r"data.sources\[0\]: cannot read .*gone.txt: it does not exist"):
        file.open()


# Hugging Face datasets


def test_missing_datasets_library_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(Source(path="hf:owner/name")) == (
        "data.sources[0]: 'hf:owner/name' needs the library datasets: pip install 'genscale[datasets]'"
    )


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the extra 'datasets' is not installed")
def test_local_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (file,) = list_files([Source(path=f"hf:{tmp_path}", licence="MIT")])
    assert (file.format, file.licence) == ("hf", "MIT")
    documents = list(read(Piece(file, 0, 2), Intake("fail", "fail", Report())))
    assert ["".join(document.blocks()) for document in documents] == ["one", "two"]
    with pytest.raises(UserError, match=r"cannot load the dataset .*split 'tset'"):
        huggingface.load(str(tmp_path), "tset", where="data.sources[0]")


def test_files_can_be_sent_to_workers(tmp_path: Path) -> None:
    import pickle

    write(tmp_path, a_txt="x")
    (file,) = list_files([Source(path=str(tmp_path))])
    again: SourceFile = pickle.loads(pickle.dumps(file))
    assert again == file

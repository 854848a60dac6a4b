import json
import math
import os
import resource
import signal

import pytest
import torch

from genscale.runs import journal
from genscale.runtime.errors import UserError


def test_appended_lines_are_read_back_and_are_plain_json_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"step": 1, "loss": 0.1 + 0.2})
    journal.append(path, {"step": 2, "text": 'line\nbreak, "quote", é'})
    assert journal.read(path) == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "text": 'line\nbreak, "quote", é'}]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert journal.read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"{", b"\0\0\0\0", b'{"step": 2}' + b"x" * 200_000])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_append(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"step": 1})
    with path.open("ab") as file:
        file.write(torn)
    assert journal.read(path) == [{"step": 1}]
    journal.append(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_file_that_is_only_a_torn_line_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    assert journal.read(path) == []
    journal.append(path, {"step": 1})
    assert journal.read(path) == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        journal.read(path)


def test_numbers_of_torch_are_numbers_and_those_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {"a": torch.tensor(2.5), "b": torch.tensor(3), "c": math.nan, "d": [math.inf, {"e": -math.inf}], "f": True}
    journal.append(path, record)
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert journal.read(path) == [{"a": 2.5, "b": 3, "c": None, "d": [None, {"e": None}], "f": True}]


def test_keep_drops_lines_and_leaves_no_file_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        journal.append(path, {"step": step})
    journal.keep(path, lambda record: record["step"] <= 2)
    assert [record["step"] for record in journal.read(path)] == [0, 1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_full_disk_is_one_clear_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: the disk is full"):
        journal.append(path, {"step": 1})


def test_a_line_that_only_partly_fits_on_the_disk_is_not_read_later(tmp_path):
    """A file-size limit stands in for the disk: the kernel takes what fits, then refuses."""
    path = tmp_path / "metrics.jsonl"
    journal.append(path, {"step": 1})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.append(path, {"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.stat().st_size == 20
    assert journal.read(path) == [{"step": 1}]
    journal.append(path, {"step": 2})
    assert journal.read(path) == [{"step": 1}, {"step": 2}]

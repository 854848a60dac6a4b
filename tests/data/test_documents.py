from __future__ import annotations

import io
from itertools import pairwise

import pytest

from genscale.data.documents import BLOCK, Document, cut, decode, fraction_of, long_blocks, measure

LINES = "".join(f"{i} naïve 日本語\n" + ("\n   indented\n" if i % 3 == 0 else "") for i in range(200_000)).encode()


def blocks(raw: bytes) -> list[bytes]:
    found = list(cut(io.BytesIO(raw)))
    assert b"".join(found) == raw
    assert all(0 < len(block) <= BLOCK for block in found)
    return found


def test_a_short_text_is_one_block() -> None:
    assert blocks(b"short\ntext") == [b"short\ntext"]
    assert blocks(b"") == []


def test_blocks_end_after_a_line_with_no_white_space_on_either_side() -> None:
    found = blocks(LINES)
    assert len(found) > 3
    for block, following in pairwise(found):
        assert block.endswith(b"\n")
        assert not block[-2:-1].isspace()
        assert not following[:1].isspace()


@pytest.mark.parametrize(
    "raw",
    [
        b"x" * (3 * BLOCK + 17),  # no line at all
        "日本語".encode() * BLOCK,  # characters of three bytes
        b"a\n\n" * BLOCK,  # empty lines only
        b" \n" * (2 * BLOCK),
        b"x" * BLOCK + b"\n" + b"y" * BLOCK,
        b"\x80" * (2 * BLOCK),  # not UTF-8
    ],
)
def test_any_bytes_can_be_cut(raw: bytes) -> None:
    found = blocks(raw)
    assert "".join(decode(block)[0] for block in found) == raw.decode(errors="replace")


def test_a_part_of_a_stream_is_cut_and_no_more_is_read() -> None:
    stream = io.BytesIO(LINES)
    assert b"".join(cut(stream, 2_000_000)) == LINES[:2_000_000]
    assert stream.tell() == 2_000_000


def test_ranges_of_a_long_text_make_the_whole() -> None:
    raw = b"\xef\xbb\xbf" + LINES
    read: list[int] = []
    found = measure(io.BytesIO(raw), 1_000_000, read.append)
    text = LINES.decode()
    assert sum(read) == len(raw)
    assert (found.characters, found.size, found.undecodable) == (len(text), len(LINES), None)
    assert found.hash == Document.of(0, text, LINES).hash
    starts = [offset for offset, _ in found.cuts]
    assert len(starts) > 2
    assert all(b - a >= 1_000_000 for a, b in pairwise(starts))
    position = 0
    for (start, first_character), stop in zip(found.cuts, [*starts[1:], None], strict=True):
        assert first_character == position
        size = None if stop is None else stop - start
        part = "".join(long_blocks(io.BytesIO(raw), start, size))
        assert part == text[position : position + len(part)]
        position += len(part)
    assert position == len(text)


def test_measuring_finds_the_first_byte_that_is_not_utf_8() -> None:
    raw = LINES.replace(b"140000 ", b"\xe9 ")
    assert measure(io.BytesIO(raw), BLOCK, lambda read: None).undecodable == raw.index(b"\xe9 na")


def test_fractions_are_even_and_depend_on_every_part() -> None:
    values = [fraction_of(seed, "split", number) for seed in range(3) for number in range(2000)]
    assert len(set(values)) == 6000
    for decile in range(10):
        share = sum(decile / 10 <= value < (decile + 1) / 10 for value in values) / 6000
        assert share == pytest.approx(0.1, abs=0.02)
    assert fraction_of(1, "a") == fraction_of(1, "a")

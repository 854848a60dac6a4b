"""Documents: texts with a hash, read block by block, so that a long one never has to be in memory."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 1 << 20
"""Bytes of text that are decoded and tokenised at once; longer documents are cut into such blocks."""

_LINE_END = re.compile(rb"[^\s]\n(?=[^\s])")
_LINE_END_WINDOW = 1 << 16


@dataclass(frozen=True)
class Document:
    """One document, or a range of characters of a long one."""

    position: int
    """Where it is in its file: record number, byte offset, or 0."""
    hash: str
    """Of the whole document's text."""
    characters: int
    """Of the whole document."""
    first_character: int
    """Where this range begins; 0 for a whole document."""
    blocks: Callable[[], Iterator[str]]
    """The text, in order; may be called again."""

    @classmethod
    def of(cls, position: int, text: str, raw: bytes) -> Document:
        """A document in memory: its text, and the same as UTF-8."""

        def blocks() -> Iterator[str]:
            if len(raw) <= BLOCK:
                return iter((text,))
            return (block.decode() for block in cut(io.BytesIO(raw)))

        return cls(position, content_hash(raw), len(text), 0, blocks)


def content_hash(raw: bytes) -> str:
    """blake2b of a text's UTF-8 bytes, 32 hex digits."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def fraction_of(*parts: object) -> float:
    """A number in [0, 1) that is a pure function of ``parts``, evenly spread."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def cut(stream: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """The next ``size`` bytes of a stream (or all that are left) in blocks of at most ``BLOCK`` bytes.

    A block ends after a line, if it can where neither side has more white space: words of the usual BPE patterns
    never reach over such a place, so that the blocks' tokens are those of the whole text.
    """
    buffer = b""
    while True:
        chunk = stream.read(BLOCK if size is None else min(BLOCK, size))
        if size is not None:
            size -= len(chunk)
        buffer += chunk
        while len(buffer) > BLOCK:
            end = _cut_point(buffer)
            yield buffer[:end]
            buffer = buffer[end:]
        if not chunk:
            if buffer:
                yield buffer
            return


def _cut_point(buffer: bytes) -> int:
    """Where to cut a buffer that is longer than BLOCK."""
    begin = BLOCK - _LINE_END_WINDOW
    ends = [line.end() for line in _LINE_END.finditer(buffer, begin, BLOCK + 1)]
    if ends:
        return ends[-1]
    line_end = buffer.rfind(b"\n", begin, BLOCK) + 1
    if line_end:
        return line_end
    end = BLOCK
    while end > BLOCK - 3 and buffer[end] & 0xC0 == 0x80:  # not inside a character
        end -= 1
    return end


def decode(raw: bytes) -> tuple[str, int | None]:
    """The text, and the offset of the first byte that is not UTF-8; such bytes become U+FFFD."""
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        return raw.decode(errors="replace"), error.start


@dataclass(frozen=True)
class LongText:
    """What one pass over a long text finds, so that it can then be read in ranges."""

    hash: str
    size: int
    """UTF-8 bytes of the text."""
    characters: int
    undecodable: int | None
    """Offset of the first byte that is not UTF-8."""
    cuts: tuple[tuple[int, int], ...]
    """Byte offset and character offset of the beginning of each range."""


def measure(stream: BinaryIO, range_size: int, tick: Callable[[int], None]) -> LongText:
    """Read a text once, in bounded memory; ``range_size`` is the least number of bytes from one cut to the next."""
    digest = hashlib.blake2b(digest_size=16)
    offset = size = characters = 0
    undecodable = None
    cuts: list[tuple[int, int]] = []
    for raw in cut(stream):
        text, bad = decode(raw)
        if bad is not None and undecodable is None:
            undecodable = offset + bad
        if not offset:
            text = text.removeprefix("\ufeff")
        if not cuts or offset - cuts[-1][0] >= range_size:
            cuts.append((offset, characters))
        encoded = text.encode()
        digest.update(encoded)
        size += len(encoded)
        characters += len(text)
        offset += len(raw)
        tick(len(raw))
    return LongText(digest.hexdigest(), size, characters, undecodable, tuple(cuts))


def long_blocks(stream: BinaryIO, start: int, size: int | None) -> Iterator[str]:
    """The text of the range of a long text that begins at byte ``start``; closes the stream."""
    with stream:
        if start:
            stream.seek(start)
        first = start == 0
        for raw in cut(stream, size):
            text, _ = decode(raw)
            yield text.removeprefix("\ufeff") if first else text
            first = False

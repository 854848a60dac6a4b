"""Images in TFRecord files, without TensorFlow: the framing with its checksums, and the ``tf.train.Example`` in it.

A record is its length (uint64), a checksum of that, the content, and a checksum of the content; the checksums are
CRC-32C, masked (tensorflow/core/lib/io/record_writer.h). An Example is a protocol buffer with one map, from names of
features to lists of bytes, floats or int64 (tensorflow/core/example/example.proto).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from genscale.data import compressed
from genscale.data.image_samples import Intake, Piece, Sample, caption_text, label_name, wanted_keys

Value = bytes | float | int

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_LANES = 256  # stretches of a record whose checksums are computed side by side
_LONGEST = 1 << 31  # bytes of a record; more is a damaged length


class BadRecord(Exception):
    """What is wrong with a record, in words."""


def read_tfrecord(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Records with the bytes of an image file."""
    file = piece.file
    with file.open() as stream:
        position = 0
        try:
            for position, content in enumerate(records(stream)):
                where = f"{file.url}, record {position}"
                try:
                    example = parse_example(content)
                    keys = wanted_keys(file, "feature", sorted(example))
                    values = {role: next(iter(example[key]), None) for role, key in keys.items()}
                    image = values["image"]
                    if not isinstance(image, bytes):
                        raise BadRecord(f"its '{keys['image']}' holds no bytes")
                    label = label_name(values.get("label"), ())
                except (BadRecord, ValueError) as error:
                    intake.bad(where, str(error))
                    continue
                yield Sample(file.path, position, image, label, caption_text(values.get("caption")))
        except (BadRecord, *compressed.DAMAGE) as error:
            intake.bad(f"{file.url}, after record {position}", f"damaged: {error}")


def records(stream: BinaryIO) -> Iterator[bytes]:
    """The content of each record.

    Raises:
        BadRecord: a checksum is not that of the content, or the file ends within a record.
    """
    while header := stream.read(12):
        if len(header) < 12:
            raise BadRecord("the file ends within the length of a record")
        length, expected = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != expected or length > _LONGEST:
            raise BadRecord("the checksum of a record's length is wrong")
        content = stream.read(length + 4)
        if len(content) < length + 4:
            raise BadRecord("the file ends within a record")
        if masked_crc32c(content[:length]) != int.from_bytes(content[length:], "little"):
            raise BadRecord("the checksum of a record is wrong")
        yield content[:length]


def parse_example(content: bytes) -> dict[str, list[Value]]:
    """The features of a serialised ``tf.train.Example``.

    Raises:
        BadRecord: it is none.
    """
    found: dict[str, list[Value]] = {}
    for features in _messages(content, 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)).decode("utf-8", "replace")
            found[name] = [value for feature in _messages(entry, 2) for value in _values(feature)]
    return found


def _values(feature: bytes) -> Iterator[Value]:
    """The list of a ``Feature``: bytes (field 1), floats (2) or int64 (3), each a message whose field 1 repeats."""
    for kind, holder in _fields(feature):
        if not isinstance(holder, bytes):
            raise BadRecord("it is no tf.train.Example")
        for _, value in _fields(holder):
            if kind == 1 and isinstance(value, bytes):
                yield value
            elif kind == 2 and isinstance(value, bytes):  # packed or one alone: four bytes each
                yield from np.frombuffer(value, "<f4", len(value) // 4).tolist()
            elif kind == 3:
                numbers = _varints(value) if isinstance(value, bytes) else [value]
                yield from (number - (1 << 64) if number >> 63 else number for number in numbers)


def _messages(content: bytes, wanted: int) -> Iterator[bytes]:
    for number, value in _fields(content):
        if number == wanted:
            if not isinstance(value, bytes):
                raise BadRecord("it is no tf.train.Example")
            yield value


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a protocol buffer message."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(content, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(content, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise BadRecord("it is no tf.train.Example")
        if place + size > len(content):
            raise BadRecord("it is no tf.train.Example, or it is cut short")
        yield number, content[place : place + size]
        place += size


def _varints(content: bytes) -> Iterator[int]:
    place = 0
    while place < len(content):
        value, place = _varint(content, place)
        yield value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """The number at this place, seven bits in a byte, and the place after it."""
    value = shift = 0
    while place < len(content) and shift < 70:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
    raise BadRecord("it is no tf.train.Example")


def masked_crc32c(content: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated by 15 bits, plus a constant."""
    value = crc32c(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(content: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4).

    A checksum that begins with 0 is linear over GF(2), and zeros in front do not change it. So the content, padded in
    front, is cut into lanes whose checksums advance together, byte by byte, in one numpy array; then neighbours are
    joined pairwise: that of the left one is moved past as many zero bytes as the right one is long, and added.
    """
    table = _table()
    if len(content) < 4 * _LANES:
        value = 0xFFFFFFFF
        for byte in content:
            value = int(table[(value ^ byte) & 0xFF]) ^ (value >> 8)
        return value ^ 0xFFFFFFFF
    steps = -(-len(content) // _LANES)
    padded = np.zeros(steps * _LANES, np.uint8)
    padded[-len(content) :] = np.frombuffer(content, np.uint8)
    padded[-len(content) :][:4] ^= 0xFF  # instead of beginning with 32 ones
    lanes = np.ascontiguousarray(padded.reshape(_LANES, steps).T).astype(np.uint32)  # (steps, lanes)
    values = np.zeros(_LANES, np.uint32)
    for column in lanes:
        values = table[(values ^ column) & 0xFF] ^ (values >> np.uint32(8))
    shift = _past_zeros(steps)
    while len(values) > 1:
        values = _apply(shift, values[0::2]) ^ values[1::2]
        shift = _apply(shift, shift)  # twice as far
    return int(values[0]) ^ 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
    """(256,) uint32: what each byte adds."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values


@functools.lru_cache(maxsize=64)
def _past_zeros(count: int) -> np.ndarray:
    """(32,) uint32: what each bit of a checksum becomes after ``count`` zero bytes."""
    values = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    for _ in range(count):
        values = _table()[values & 0xFF] ^ (values >> np.uint32(8))
    return values


def _apply(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A linear map of 32 bits, given by what becomes of each bit, of all values."""
    bits = (values[:, None] >> np.arange(32, dtype=np.uint32)) & 1  # (values, 32)
    return np.bitwise_xor.reduce(np.where(bits.astype(bool), matrix, np.uint32(0)), axis=1)

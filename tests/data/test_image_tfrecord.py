from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest

from genscale.data.image_tfrecord import BadRecord, crc32c, masked_crc32c, parse_example, records


def bit_by_bit(content: bytes) -> int:
    """CRC-32C by its definition: division by the polynomial, one bit at a time."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("content", "expected"),
    [  # RFC 3720, appendix B.4, and the usual check value
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_checksums(content: bytes, expected: int) -> None:
    assert crc32c(content) == expected


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 1279, 1280, 4096, 10_007])
def test_checksums_in_lanes_are_those_bit_by_bit(size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    assert crc32c(content) == bit_by_bit(content)
    zeros = bytes(size)  # leading zeros matter too
    assert crc32c(zeros) == bit_by_bit(zeros)


def test_a_megabyte_takes_no_time() -> None:
    content = bytes(1 << 20)
    crc32c(content)
    began = time.process_time()
    crc32c(content)
    assert time.process_time() - began < 0.5  # byte by byte it takes over a second at the best of times


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


def test_a_record_written_by_tensorflow_is_read() -> None:
    """The first bytes of an event file: every version of TensorFlow begins one with the event of its file version."""
    # tf.summary writes an Event with file_version "brain.Event:2"; its record as tensorboard writes it:
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    contents = [b"", b"brain.Event:2", bytes(range(256)) * 20]
    for content in contents:
        writer.write(content)
    assert list(records(io.BytesIO(file.getvalue()))) == contents
    assert file.getvalue() == b"".join(map(record, contents))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-1], "ends within a record"),
        (lambda content: content[:5], "ends within the length of a record"),
        (lambda content: b"\1" + content[1:], "checksum of a record's length"),
        (lambda content: content[:14] + b"?" + content[15:], "checksum of a record is wrong"),
    ],
)
def test_damage_is_found_after_the_whole_records(damage, reason: str) -> None:
    whole, torn = record(b"first"), damage(record(b"a second one"))
    found = records(io.BytesIO(whole + torn))
    assert next(found) == b"first"
    with pytest.raises(BadRecord, match=reason):
        next(found)


def example_class():
    """tf.train.Example as google.protobuf makes it from example.proto and feature.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="check", syntax="proto3")
    for name, kind in (
        ("BytesList", kinds.TYPE_BYTES),
        ("FloatList", kinds.TYPE_FLOAT),
        ("Int64List", kinds.TYPE_INT64),
    ):
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, type=kind, label=kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (field, kind) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1
    ):
        feature.field.add(
            name=field,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=f".check.{kind}",
            label=kinds.LABEL_OPTIONAL,
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=kinds.TYPE_MESSAGE, type_name=".check.Feature", label=kinds.LABEL_OPTIONAL
    )
    features.field.add(
        name="feature",
        number=1,
        type=kinds.TYPE_MESSAGE,
        type_name=".check.Features.FeatureEntry",
        label=kinds.LABEL_REPEATED,
    )
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features", number=1, type=kinds.TYPE_MESSAGE, type_name=".check.Features", label=kinds.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("check.Example"))


def test_an_example_written_by_protobuf_is_read() -> None:
    pytest.importorskip("google.protobuf", reason="needs protobuf to write an example with")
    example = example_class()()
    features = example.features.feature
    features["image"].bytes_list.value.append(b"\x89PNG" * 100)
    features["many"].bytes_list.value.extend([b"a", b"", b"c"])
    features["label"].int64_list.value.extend([0, 300, -1, 2**62])
    features["weights"].float_list.value.extend([0.5, -2.0])
    features["none"].int64_list.value.extend([])
    assert parse_example(example.SerializeToString()) == {
        "image": [b"\x89PNG" * 100],
        "many": [b"a", b"", b"c"],
        "label": [0, 300, -1, 2**62],
        "weights": [0.5, -2.0],
        "none": [],
    }


@pytest.mark.parametrize("content", [b"\xff\xff\xff", b"\x0a\x7fabc", b"\x0b", b"\x0a\x02\x0a\x05"])
def test_what_is_no_example(content: bytes) -> None:
    with pytest.raises(BadRecord, match=r"no tf\.train\.Example"):
        parse_example(content)

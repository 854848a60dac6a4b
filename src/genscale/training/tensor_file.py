"""One safetensors file: written in one pass with a checksum for each tensor, read tensor by tensor.

The format (https://huggingface.co/docs/safetensors) is 8 bytes of header length, a JSON header, then the tensors' bytes
one after another. It is written here because the library copies every tensor into a Python ``bytes`` first and cannot
give checksums on the way; any safetensors reader opens the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Safetensors' names of the types."""


class DamagedFile(Exception):
    """A file's bytes are not the ones that were written."""


class Extent(NamedTuple):
    """Where a tensor's bytes lie in a file."""

    start: int
    bytes: int
    checksum: str
    """blake2b, 32 hex digits."""


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row, without a copy where they already lie so."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(content: memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Extent]:
    """Write CPU tensors to a new file and flush it to the disk; returns where each lies."""
    # Wide types first, as the library does, so that every tensor starts at a multiple of its element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in names:
        end = position + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    extents: dict[str, Extent] = {}
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        position = 8 + len(text)
        for name in names:
            content = _bytes(tensors[name])
            _write_all(file.fileno(), content)
            extents[name] = Extent(position, len(content), _checksum(content))
            position += len(content)
        os.fsync(file.fileno())
    return extents


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:  # Linux writes at most 2 GiB at a time
        content = content[os.write(descriptor, content) :]


def read(descriptor: int, extent: Extent, into: Tensor) -> None:
    """One tensor's bytes from an open file into a CPU tensor of uint8; raises DamagedFile when they have changed."""
    view = into[: extent.bytes].numpy().data
    done = 0
    while done < extent.bytes:
        count = os.preadv(descriptor, [view[done:]], extent.start + done)
        if count == 0:
            raise DamagedFile("is cut short")
        done += count
    if _checksum(view) != extent.checksum:
        raise DamagedFile("does not have the checksum that was recorded")

"""Images in parquet files and in datasets of the Hugging Face library: a column of bytes, or of their struct."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from genscale.data.image_samples import Intake, Piece, Sample, caption_text, label_name, wanted_keys
from genscale.data.image_sources import ImageFile
from genscale.runtime.errors import UserError

_ROWS = 64  # that are in memory at once


def read_parquet(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Rows with the bytes of an image file, or Hugging Face's struct of ``bytes`` and ``path``."""
    import pyarrow as pa

    file = piece.file
    with file.open(seek=True) as stream:
        table = open_parquet(file, stream, intake)
        if table is None:
            return
        keys = wanted_keys(file, "column", table.schema_arrow.names)
        _check_type(file, table.schema_arrow.field(keys["image"]).type)
        names = _class_names(table.schema_arrow.metadata, keys.get("label"))
        intake.report.declare(names)
        groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
        position = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in groups:
            following = position + table.metadata.row_group(group).num_rows
            try:
                batches = table.iter_batches(_ROWS, row_groups=[group], columns=list(keys.values()), use_threads=False)
                for batch in batches:
                    yield from _rows(batch, keys, names, file, position, intake)
                    position += len(batch)
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
                intake.bad(f"{file.url}, row group {group} from row {position} on", f"damaged: {reason}")
            position = following


def open_parquet(file: ImageFile, stream: Any, intake: Intake) -> Any:
    """The ``pyarrow.parquet.ParquetFile``, or None when its footer is damaged and may be left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(stream, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        intake.bad(file.url, f"it is not a parquet file: {' '.join(str(error).split())}")
        return None


def read_dataset(piece: Piece, intake: Intake) -> Iterator[Sample]:
    """Rows of a split of a Hugging Face dataset."""
    from genscale.data.huggingface import load

    file = piece.file
    dataset = load(file.url, file.split, where=f"data.sources[{file.source}]")
    keys = wanted_keys(file, "column", dataset.column_names)
    feature = dataset.features.get(keys["label"]) if "label" in keys else None
    names = list(getattr(feature, "names", None) or ())
    intake.report.declare(names)
    dataset = dataset.select_columns(list(keys.values())).with_format("arrow")
    _check_type(file, dataset.data.schema.field(keys["image"]).type)
    stop = len(dataset) if piece.stop is None else piece.stop
    for start in range(piece.start, stop, _ROWS):
        yield from _rows(dataset[start : min(start + _ROWS, stop)], keys, names, file, start, intake)


def _rows(
    table: Any, keys: dict[str, str], names: list[str], file: ImageFile, first: int, intake: Intake
) -> Iterator[Sample]:
    """The samples of a batch or table of arrow, whose first row is number ``first`` of the file."""
    columns = {role: table.column(key).to_pylist() for role, key in keys.items()}
    for row, image in enumerate(columns["image"]):
        where = f"{file.url}, row {first + row}"
        try:
            content = _content(image)
            label = label_name(columns["label"][row], names) if "label" in columns else None
        except (ValueError, OSError) as error:
            intake.bad(where, str(error))
            continue
        caption = caption_text(columns["caption"][row]) if "caption" in columns else None
        yield Sample(file.path, first + row, content, label, caption)


def _content(value: Any) -> bytes:
    """The bytes of an image file."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            with open(value["path"], "rb") as file:
                return file.read()
        value = value.get("bytes")
    if value is None:
        raise ValueError("there is no image")
    return bytes(value)


def _check_type(file: ImageFile, kind: Any) -> None:
    import pyarrow as pa

    inner = kind
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        inner = kind.field(index).type if index >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UserError(
            f"{file.url}: column '{file.image}' (data.sources[{file.source}].image) is {kind}, "
            "expected the bytes of image files, or a struct of bytes and path"
        )


def _class_names(metadata: dict[bytes, bytes] | None, label: str | None) -> list[str]:
    """The names of the classes, where Hugging Face's library left them in a parquet file."""
    if label is None or b"huggingface" not in (metadata or {}):
        return []
    assert metadata is not None
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]

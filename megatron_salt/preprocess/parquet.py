"""Rows of a parquet file as packed columns of bytes: read some at a time, and unpacked again.

pyarrow is optional and is imported when a table is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_salt.errors import UserError

_MOST_ROWS = 1 << 16  # at a time
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")  # as Arrow prints them


@dataclass(frozen=True)
class Rows:
    """Rows [first, end) of a table."""

    first: int
    end: int
    on_disk: int
    """About how many bytes of the file were read up to `end`."""
    data: bytes
    """The columns, as `unpack` takes them."""


def read_rows(path: str, keys: Sequence[str], start: int, chunk_bytes: int) -> Iterator[Rows]:
    """The columns `keys` of the rows from `start` on, about `chunk_bytes` at a time. UserError when the file cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"--input {path}: reading .parquet takes pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            _check_columns(path, table.schema_arrow, keys)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            total = max(table.metadata.num_rows, 1)
            mean = sum(group.total_byte_size for group in groups) // total
            at_a_time = max(1, min(chunk_bytes // max(mean, 1), _MOST_ROWS))
            next_group = 0
            for i, group in enumerate(groups):
                at, next_group = next_group, next_group + group.num_rows
                if next_group <= start:
                    continue
                for batch in table.iter_batches(
                    at_a_time, row_groups=[i], columns=list(dict.fromkeys(keys)), use_threads=False
                ):
                    skipped = min(max(start - at, 0), batch.num_rows)
                    at += batch.num_rows
                    if skipped < batch.num_rows:
                        part = batch.slice(skipped)
                        yield Rows(at - part.num_rows, at, os.path.getsize(path) * at // total, _packed(part, keys))
    except pyarrow.ArrowException as error:
        raise UserError(f"--input {path} is damaged or truncated: {str(error).splitlines()[0]}") from None


def _check_columns(path: str, schema, keys: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    import pyarrow.types as types

    for key in keys:
        if key not in schema.names:
            raise UserError(f"--input {path}: no column {key!r} (--json-keys); it has {', '.join(schema.names)}")
        kind = schema.field(key).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if str(kind) not in _TEXT_TYPES:
            raise UserError(f"--input {path}: the column {key!r} (--json-keys) does not hold strings but {kind}")


def _packed(batch, keys: Sequence[str]) -> bytes:  # type: ignore[no-untyped-def]
    """The columns of a record batch: int64 number of rows; per column int64 lengths [rows], -1 for a null, and the bytes."""
    import pyarrow

    parts = []
    for key in keys:
        column = batch.column(key)
        if pyarrow.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        null = np.asarray(column.is_null())
        column = column.cast(pyarrow.large_binary()).fill_null(b"")  # Arrow does not define the bytes under a null
        _, offset_buffer, data = column.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
        lengths = np.diff(offsets)
        lengths[null] = -1
        parts += [lengths.tobytes(), data.slice(offsets[0], offsets[-1] - offsets[0]).to_pybytes() if data else b""]
    return np.int64(batch.num_rows).tobytes() + b"".join(parts)


def unpack(data: bytes, num_keys: int) -> list[list[bytes | None]]:
    """The values of all rows, per key; None for a null."""
    rows, at = int(np.frombuffer(data, np.int64, 1)[0]), 8
    columns = []
    for _ in range(num_keys):
        lengths = np.frombuffer(data, np.int64, rows, at).tolist()
        at += 8 * rows
        column: list[bytes | None] = []
        for length in lengths:
            column.append(None if length < 0 else data[at : at + length])
            at += max(length, 0)
        columns.append(column)
    return columns

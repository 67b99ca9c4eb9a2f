"""A safetensors file, written a few rows of a tensor at a time.

The library's save_file takes all tensors of a file at once. The format is public and simple: the length of a header, the header in JSON,
and the bytes of every tensor. Sizes are known before the first tensor is, so each one has its place. The file is byte for byte the one
that save_file writes of the same tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_salt.convert.tensor_part import Shape

_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16"}
_ALIGNMENT = 8
"""The header's length is a multiple of it; so tensors of 8 bytes a number may be mapped."""

WriteRows = Callable[[str, int, Tensor], None]
"""Writes rows of a tensor: its name, the number of the first row, and the rows [n, ...] in any dtype."""


@contextmanager
def safetensors_file(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Iterator[WriteRows]:
    """Make a file of tensors of these names and shapes; the block writes every row once. It is on the disk when the block ends.

    dtype: float32 or bfloat16. Memory: the rows that are written, in the dtype. Raises OSError that names the file. After an error the
    file is not whole.
    """
    header, starts = header_of(shapes, dtype)
    try:
        with open(path, "wb", buffering=0) as file:
            _write_at(file.fileno(), 0, memoryview(header))

            def write_rows(name: str, first: int, rows: Tensor) -> None:
                shape = shapes[name]
                assert rows.shape[1:] == shape[1:] and first + len(rows) <= shape[0], (name, first, rows.shape, shape)
                place = starts[name] + first * dtype.itemsize * torch.Size(shape[1:]).numel()
                numbers = rows.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
                _write_at(file.fileno(), len(header) + place, numbers.data)

            yield write_rows
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def header_of(shapes: Mapping[str, Shape], dtype: torch.dtype) -> tuple[bytes, Mapping[str, int]]:
    """The bytes before the first tensor, and {name: where its bytes begin after them}. Pure. Tensors lie in the order of their names."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(shapes, key=str.encode):
        starts[name] = end
        end += dtype.itemsize * torch.Size(shapes[name]).numel()
        entries[name] = {"dtype": _KINDS[dtype], "shape": list(shapes[name]), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, starts


def _write_at(descriptor: int, place: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        place, data = place + written, data[written:]

"""A GGUF file: its metadata, and its tensors one at a time, dequantised.

A stranger made the file. One that is cut off, is no GGUF file, or has tensors of a kind that cannot be read is refused by name. The bytes
of a tensor are read only when it is asked for, so memory holds one tensor.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_salt.convert.gguf.bounded_reader import open_bounded
from megatron_salt.convert.tensor_part import Shape
from megatron_salt.errors import UserError

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that hold numbers as they are."""


def gguf_library() -> ModuleType:
    """The library that reads these files. Raises UserError that says how to install it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError(
            "this needs gguf, which is not installed: pip install 'megatron-salt[hf]', or pip install gguf"
        ) from None
    return gguf


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    kind: str
    """Its type, such as F32 or Q4_K."""
    shape: Shape
    """As torch orders axes: rows first."""
    offset: int
    """Bytes from the beginning of the file."""
    row_bytes: int
    """Bytes of one entry of the first axis."""


class GgufFile:
    """The metadata and the tensors of a file."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata and the table of tensors. Raises UserError."""
        self.path = path
        self.metadata, self.tensors = _contents(path)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives: float32 for a quantised tensor."""
        return _PLAIN.get(self.tensors[name].kind, torch.float32)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows."""
        stored = self.tensors[name]
        start, stop = (0, stored.shape[0]) if rows is None else (rows.start, rows.stop)
        shape = (stop - start, *stored.shape[1:])
        size = (stop - start) * stored.row_bytes
        raw = np.fromfile(self.path, np.uint8, size, offset=stored.offset + start * stored.row_bytes)
        if stored.kind in _PLAIN:
            return torch.from_numpy(raw).view(_PLAIN[stored.kind]).reshape(shape)
        library = gguf_library()
        with np.errstate(all="ignore"):  # a damaged scale gives numbers that are not finite: refused where they are written
            numbers = library.quants.dequantize(raw.reshape(*shape[:-1], -1), library.GGMLQuantizationType[stored.kind])
        return torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).reshape(shape)

    def quantised(self) -> Mapping[str, int]:
        """{type: number of tensors} of the quantised tensors."""
        return dict(Counter(stored.kind for stored in self.tensors.values() if stored.kind not in _PLAIN))


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and table of tensors. Raises UserError."""
    library = gguf_library()
    if not path.is_file():
        raise UserError(f"{path} is not a file; --from gguf takes one .gguf file")
    try:
        reader = open_bounded(library, path)
        if reader.byte_order != "I" or sys.byteorder != "little":
            raise ValueError("its numbers are big-endian")
        metadata = {name: _plain(field.contents(), field.types) for name, field in reader.fields.items()}
        tensors = {str(tensor.name): _stored(library, tensor) for tensor in reader.tensors}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no GGUF file: {why}") from None
    strange = sorted({f"{name} is {stored.kind}" for name, stored in tensors.items() if not _can_read(library, stored.kind)})
    if strange:
        raise UserError(f"{path}: {strange[0]}, a type whose numbers cannot be read; {len(strange)} tensors have such types")
    return metadata, tensors


def _plain(value: Any, types: list[Any]) -> Any:
    """A value of the metadata. A float32 becomes the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    if types and types[0].name == "FLOAT32":
        return float(str(np.float32(value)))
    return value


def _stored(library: ModuleType, tensor: Any) -> StoredTensor:
    block, block_bytes = library.GGML_QUANT_SIZES[tensor.tensor_type]
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    width = shape[-1] // block * block_bytes if len(shape) > 1 else block_bytes
    if len(shape) == 1 and block > 1:
        raise ValueError(f"{tensor.name} has one axis and is quantised")
    return StoredTensor(
        kind=tensor.tensor_type.name,
        shape=shape,
        offset=int(tensor.data_offset),
        row_bytes=width * math.prod(shape[1:-1]),
    )


def _can_read(library: ModuleType, kind: str) -> bool:
    if kind in _PLAIN:
        return True
    quantised = library.GGMLQuantizationType[kind]
    block, block_bytes = library.GGML_QUANT_SIZES[quantised]
    if block == 1:
        return False
    try:
        library.quants.dequantize(np.zeros((1, block_bytes), np.uint8), quantised)
    except NotImplementedError:
        return False
    return True

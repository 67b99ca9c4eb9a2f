"""The gguf library's reader, held to the size of the file.

A stranger made the file, and the library believes its counts, lengths and offsets. It would make a Python object for each of 2**40 values,
or take an empty array for bytes beyond the end. Here every number is compared with the file, or with a limit far above real models,
before the library acts on it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_MOST_VALUES = 2**23
"""Values in all arrays of the metadata: a vocabulary of a million tokens has about four million."""
_MOST_TENSORS = 2**16
_MOST_AXES = 4
_LONGEST_NAME = 64
"""Bytes of a tensor's name, as in llama.cpp."""
_ARRAY = 9
"""The type of an array among the types of the metadata."""
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 8: 8, 10: 8, 11: 8, 12: 8}
"""{type of a value: bytes that one takes at least}: a string begins with its length."""
_ENTRY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes that an entry of the metadata, and one of the table of tensors, takes at least."""


def open_bounded(library: ModuleType, path: Path) -> Any:
    """A GGUFReader of the file. Raises ValueError for a file that is cut off or contradicts itself, and what the library raises."""

    class Reader(library.GGUFReader):  # type: ignore[name-defined]
        """Raises before memory or time is spent on what the file cannot hold."""

        _values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it is cut off: it has {len(self.data)} bytes, and names what ends at byte {end}")
            return super()._get(offset, dtype, count, override_order)

        def _build_fields(self, offs: int, count: int) -> int:
            _refuse_count("entries of metadata", int(count), (len(self.data) - offs) // _ENTRY_BYTES)
            return int(super()._build_fields(offs, count))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == _ARRAY:
                kind, length = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
                if kind not in _VALUE_BYTES:
                    raise ValueError(f"its metadata has an array of values of type {kind}")
                _refuse_count("values in an array", length, (len(self.data) - orig_offs - 12) // _VALUE_BYTES[kind])
                self._values += length
                _refuse_count("values in arrays", self._values, _MOST_VALUES)
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _refuse_count("tensors", int(count), min(_MOST_TENSORS, (len(self.data) - offs) // _TENSOR_BYTES))
            return super()._build_tensor_info(offs, count)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            _refuse_places(library, int(start_offs), [field.parts for field in fields], len(self.data))
            super()._build_tensors(start_offs, fields)

    reader = Reader(path)
    for name in reader.fields:
        _refuse_unprintable("key", name)
    return reader


def _refuse_count(of_what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"it claims {count} {of_what}, and at most {max(most, 0)} can be there")


def _refuse_unprintable(what: str, name: str) -> None:
    if not name.isprintable():  # it would break the one line of a message
        raise ValueError(f"it has a {what} that cannot be printed: {name[:_LONGEST_NAME]!r}")


def _refuse_places(library: ModuleType, start: int, table: list[Any], size: int) -> None:
    """Raise ValueError where a tensor has no lawful name, shape or place. start: the byte that offsets count from. size: of the file."""
    places = []
    for _, name_data, _, dims, raw_kind, offset in table:
        if len(name_data) > _LONGEST_NAME:
            raise ValueError(f"a tensor's name has {len(name_data)} bytes; at most {_LONGEST_NAME} are lawful")
        name = bytes(name_data).decode()
        _refuse_unprintable("tensor", name)
        shape = [int(length) for length in reversed(dims.tolist())]
        if not 1 <= len(shape) <= _MOST_AXES or min(shape) < 1:
            raise ValueError(f"{name} has the shape {shape[: _MOST_AXES + 1]}")
        block, block_bytes = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(raw_kind[0])]
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} numbers, and its type has blocks of {block}")
        begin = start + int(offset[0])
        end = begin + math.prod(shape) // block * block_bytes
        if end > size:
            raise ValueError(f"it is cut off: it has {size} bytes, and {name} ends at byte {end}")
        places.append((begin, end, name))
    places.sort()
    for (_, end, name), (begin, _, following) in pairwise(places):
        if begin < end:
            raise ValueError(f"{name} ends at byte {end}, and {following} begins at byte {begin}: they overlap")

"""Megatron's .bin/.idx pair: the format, and one open dataset.

The format is that of megatron/core/datasets/indexed_dataset.py. PREFIX.bin holds the token ids of all documents end to end.
PREFIX.idx holds a header, then int32 lengths [sequences], int64 byte offsets [sequences] and int64 document boundaries
[documents + 1]. Multimodal data alone adds int8 modes [sequences].
Opening reads the header, two offsets and one length: its cost does not grow with the data. Tokens are read with pread, not
through a memory map: a file that is cut short under a running job gives an error with its name instead of SIGBUS.
"""

from __future__ import annotations

import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_salt.errors import UserError, file_error

HEADER = struct.Struct("<9sQBQQ")
"""MAGIC; VERSION, u64; dtype code, u8; number of sequences, u64; number of document boundaries, u64."""
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""numpy's name of a token's type, by its code."""
LENGTH_BYTES, POINTER_BYTES, BOUNDARY_BYTES = 4, 8, 8


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One open dataset: the tokens of all its documents, end to end. Threads and forked processes may share it."""

    prefix: str
    """Path without .bin and .idx."""

    num_tokens: int
    num_documents: int
    dtype: np.dtype
    """Integer type of a stored token."""

    flag: str
    """The flag that named this dataset, for error messages."""

    descriptor: int
    """Open file descriptor of the .bin file; closed with the object."""

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor)

    @classmethod
    def open(cls, prefix: str, flag: str = "--data-path") -> TokenFile:
        """Open PREFIX.bin and PREFIX.idx, at a cost that does not grow with them. UserError if they are not one sound dataset."""
        refuse_missing(prefix, flag)
        try:
            num_tokens, num_documents, dtype = _read_index(f"{prefix}.idx", f"{flag} {prefix}")
            descriptor = os.open(f"{prefix}.bin", os.O_RDONLY)
        except OSError as error:
            raise file_error(f"{flag} {prefix}: cannot read {error.filename or prefix}: {error.strerror}", error) from error
        file = cls(
            prefix=prefix,
            num_tokens=num_tokens,
            num_documents=num_documents,
            dtype=dtype,
            flag=flag,
            descriptor=descriptor,
        )
        promised, actual = num_tokens * dtype.itemsize, os.fstat(descriptor).st_size
        if actual != promised:
            how = "truncated" if actual < promised else "longer than its index says"
            raise UserError(
                f"{flag} {prefix}: {prefix}.bin is {how}: it has {actual} bytes, "
                f"{prefix}.idx speaks of {num_tokens} {dtype.name} tokens, {promised} bytes"
            )
        return file

    def read(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Tokens [s, s + count) for each s in `starts` (int [n]) -> int64 [n, count]."""
        raw = np.empty((len(starts), count), self.dtype)
        for row, start in zip(raw, starts.tolist(), strict=True):
            self._fill(row, start * self.dtype.itemsize)
        return raw.astype(np.int64)

    def _fill(self, row: np.ndarray, offset: int) -> None:
        """Read all of `row` from byte `offset` on."""
        try:
            done = os.preadv(self.descriptor, [row.data], offset)
            while done < row.nbytes:  # a network file system may return fewer bytes
                more = os.preadv(self.descriptor, [row.data.cast("B")[done:]], offset + done)
                if more == 0:
                    raise UserError(
                        f"{self.flag} {self.prefix}: {self.prefix}.bin ends at byte {offset + done}; it had "
                        f"{self.num_tokens * self.dtype.itemsize} bytes when it was opened"
                    )
                done += more
        except OSError as error:
            raise file_error(f"{self.flag} {self.prefix}: cannot read {self.prefix}.bin: {error.strerror}", error) from error


def refuse_missing(prefix: str, flag: str) -> None:
    """UserError, with advice, unless PREFIX.bin and PREFIX.idx are regular files."""
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(path):
            problem = "is not a regular file" if os.path.exists(path) else "does not exist"
            raise UserError(f"{flag} {prefix}: {path} {problem}{_advice(prefix)}")


def _advice(prefix: str) -> str:
    """End of the message: the datasets in the folder of `prefix`, or how to make one."""
    folder = prefix if os.path.isdir(prefix) else os.path.dirname(prefix) or "."
    try:
        present = sorted(
            (name.removesuffix(".idx") for name in os.listdir(folder) if name.endswith(".idx")),
            key=lambda name: (not name.startswith(os.path.basename(prefix)), name),
        )  # PREFIX_text_document for PREFIX first
    except OSError:
        present = []
    if present:
        more = f" and {len(present) - 3} more" if len(present) > 3 else ""
        return f"; {folder} holds the datasets {', '.join(present[:3])}{more}"
    return "; tools/preprocess_data.py makes a dataset of text, examples/preprocess.sh on a cluster"


def _read_index(path: str, context: str) -> tuple[int, int, np.dtype]:
    """(number of tokens, number of documents, dtype) of an .idx file. UserError, which begins with `context`, if it is damaged."""
    with Path(path).open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < HEADER.size:
            raise UserError(f"{context}: {path} is truncated: {size} bytes, its header alone takes {HEADER.size}")
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC:
            raise UserError(f"{context}: {path} is not a Megatron index: it begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise UserError(f"{context}: {path} has version {version}; only version {VERSION} is known")
        dtype = np.dtype(DTYPES.get(code, "V1"))
        if dtype.kind not in "iu":
            raise UserError(f"{context}: {path} has dtype code {code} ({DTYPES.get(code, 'unknown')}); token ids are integers")
        promised = HEADER.size + (LENGTH_BYTES + POINTER_BYTES) * num_sequences + BOUNDARY_BYTES * num_boundaries
        if size not in (promised, promised + num_sequences):  # the second size: with modes
            how = "truncated" if size < promised else "longer than its header says"
            raise UserError(
                f"{context}: {path} is {how}: it has {size} bytes, {num_sequences} sequences and "
                f"{num_boundaries} document boundaries take {promised}"
            )
        if num_sequences == 0:
            raise UserError(f"{context}: the dataset is empty: {path} lists 0 sequences")
        lengths, pointers = HEADER.size, HEADER.size + LENGTH_BYTES * num_sequences
        first_pointer = _read_integer(stream, pointers, POINTER_BYTES)
        last_length = _read_integer(stream, lengths + LENGTH_BYTES * (num_sequences - 1), LENGTH_BYTES)
        last_pointer = _read_integer(stream, pointers + POINTER_BYTES * (num_sequences - 1), POINTER_BYTES)
    if first_pointer != 0 or last_pointer < 0 or last_length < 0 or last_pointer % dtype.itemsize:
        raise UserError(
            f"{context}: {path} is damaged: its first sequence starts at byte {first_pointer}, its last at {last_pointer} "
            f"with {last_length} {dtype.name} tokens"
        )
    num_tokens = last_pointer // dtype.itemsize + last_length
    if num_tokens == 0:
        raise UserError(f"{context}: the dataset is empty: {path} lists {num_sequences} sequences without a token")
    return num_tokens, max(num_boundaries - 1, 0), dtype


def _read_integer(stream: BinaryIO, offset: int, width: int) -> int:
    stream.seek(offset)
    return int.from_bytes(stream.read(width), "little", signed=True)

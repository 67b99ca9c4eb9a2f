"""A Megatron .bin/.idx pair as fixed windows of one token stream.

Window i of a stream of N tokens is tokens [i*L, i*L + L]: L inputs and, one further, L labels. Its last token is the
first of window i+1, so there are (N-1)//L windows, whatever the seed, batch size or number of epochs.
Opening reads the header, two pointers and one length, so its cost does not grow with the data. Tokens are read with
pread instead of a memory map: a file cut short under a running job is then an error with a name, not SIGBUS.
"""

from __future__ import annotations

import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_salt.errors import UserError

# An .idx file (megatron/core/datasets/indexed_dataset.py): magic, version u64, dtype code u8, number of sequences u64, number
# of document boundaries u64, then int32 lengths [sequences], int64 byte pointers [sequences], int64 boundaries
# [documents + 1] and, for multimodal data alone, int8 modes [sequences].
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


@dataclass(frozen=True)
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
        """Open PREFIX.bin and PREFIX.idx, O(1) in their size. UserError if they are not one sound dataset."""
        refuse_missing(prefix, flag)
        try:
            num_tokens, num_documents, dtype = _read_index(f"{prefix}.idx", f"{flag} {prefix}")
            descriptor = os.open(f"{prefix}.bin", os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{flag} {prefix}: cannot read {error.filename or prefix}: {error.strerror}") from error
        file = cls(prefix, num_tokens, num_documents, dtype, flag, descriptor)
        promised, found = num_tokens * dtype.itemsize, os.fstat(descriptor).st_size
        if found != promised:
            how = "truncated" if found < promised else "longer than its index says"
            raise UserError(
                f"{flag} {prefix}: {prefix}.bin is {how}: it has {found} bytes, "
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
        try:
            done = os.preadv(self.descriptor, [row.data], offset)
            while done < row.nbytes:  # a network file system may return less than was asked for
                more = os.preadv(self.descriptor, [row.data.cast("B")[done:]], offset + done)
                if more == 0:
                    raise UserError(
                        f"{self.flag} {self.prefix}: {self.prefix}.bin ends at byte {offset + done}; it had "
                        f"{self.num_tokens * self.dtype.itemsize} bytes when it was opened"
                    )
                done += more
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.prefix}.bin") from error


def refuse_missing(prefix: str, flag: str) -> None:
    """UserError, with the way out, where PREFIX.bin and PREFIX.idx are not two files."""
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(path):
            problem = "is not a regular file" if os.path.exists(path) else "does not exist"
            raise UserError(f"{flag} {prefix}: {path} {problem}{_way_out(prefix)}")


def _way_out(prefix: str) -> str:
    folder = prefix if os.path.isdir(prefix) else os.path.dirname(prefix) or "."
    try:
        there = sorted(
            (name.removesuffix(".idx") for name in os.listdir(folder) if name.endswith(".idx")),
            key=lambda name: (not name.startswith(os.path.basename(prefix)), name),
        )  # PREFIX_text_document for PREFIX first
    except OSError:
        there = []
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        return f"; {folder} holds the datasets {', '.join(there[:3])}{more}"
    return "; tools/preprocess_data.py makes a dataset of text, examples/preprocess.sh on a cluster"


def _read_index(path: str, context: str) -> tuple[int, int, np.dtype]:
    """(number of tokens, number of documents, dtype) of an .idx file; UserError, opened by `context`, if it is damaged."""
    with Path(path).open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < _HEADER.size:
            raise UserError(f"{context}: {path} is truncated: {size} bytes, its header alone takes {_HEADER.size}")
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(stream.read(_HEADER.size))
        if magic != _MAGIC:
            raise UserError(f"{context}: {path} is not a Megatron index: it begins with {magic!r}, not {_MAGIC!r}")
        if version != 1:
            raise UserError(f"{context}: {path} has version {version}; only version 1 is known")
        dtype = np.dtype(_DTYPES.get(code, "V1"))
        if dtype.kind not in "iu":
            raise UserError(f"{context}: {path} has dtype code {code} ({_DTYPES.get(code, 'unknown')}); token ids are integers")
        promised = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size not in (promised, promised + num_sequences):  # the second: with modes, which text does not need
            how = "truncated" if size < promised else "longer than its header says"
            raise UserError(
                f"{context}: {path} is {how}: it has {size} bytes, {num_sequences} sequences and "
                f"{num_boundaries} document boundaries take {promised}"
            )
        if num_sequences == 0:
            raise UserError(f"{context}: the dataset is empty: {path} lists 0 sequences")
        lengths, pointers = _HEADER.size, _HEADER.size + 4 * num_sequences
        first_pointer = _read_integer(stream, pointers, 8)
        last_length = _read_integer(stream, lengths + 4 * (num_sequences - 1), 4)
        last_pointer = _read_integer(stream, pointers + 8 * (num_sequences - 1), 8)
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


class Windows:
    """The windows of one dataset: `len()` of them, each L + 1 tokens. UserError if the dataset is shorter than one."""

    def __init__(self, file: TokenFile, seq_length: int) -> None:
        self.file = file
        self.seq_length = seq_length
        self._num_windows = (file.num_tokens - 1) // seq_length
        if self._num_windows == 0:
            raise UserError(
                f"{file.flag} {file.prefix}: {file.num_tokens} tokens are fewer than one sample of --seq-length {seq_length}, "
                f"which takes {seq_length + 1}; make the dataset of more text, or --seq-length shorter"
            )

    def __len__(self) -> int:
        return self._num_windows

    def read(self, window: int) -> np.ndarray:
        """Tokens of one window -> int64 [L + 1]."""
        return self.read_many(np.array([window]))[0]

    def read_many(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of several windows, int [n], in the order given -> int64 [n, L + 1]."""
        assert windows.size == 0 or (windows.min() >= 0 and windows.max() < self._num_windows), (windows, self._num_windows)
        return self.file.read(windows.astype(np.int64) * self.seq_length, self.seq_length + 1)


def num_held_out(num_windows: int, valid_share: float, prefix: str, seq_length: int) -> int:
    """How many of a dataset's windows, the last ones, --valid-share holds out: at least one, unless the share is 0. UserError where none
    would remain. prefix, seq_length: for the error alone."""
    if not valid_share:
        return 0
    if num_windows < 2:
        raise UserError(
            f"--valid-share {valid_share}: {prefix} has {num_windows} window of --seq-length {seq_length}; at least one must remain for "
            "training and one be held out"
        )
    return max(1, int(num_windows * valid_share))

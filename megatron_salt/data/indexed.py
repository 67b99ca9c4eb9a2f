"""Writing Megatron's .bin/.idx: what mcore's IndexedDatasetBuilder writes, byte for byte, in constant memory.

.bin holds the ids of all documents end to end. .idx holds magic, version, dtype code, two counts, then int32 lengths, int64
byte offsets and int64 document boundaries (0 .. number of documents; one sequence a document). Both are hashed while
they are written. numpy and the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.data.manifest import content_hash

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_CHUNK = 1 << 20  # documents whose index entries are in memory at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron stores ids of a vocabulary in: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Written:
    """What a finished writer left on disk."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_hash: str
    idx_hash: str


class IndexedWriter:
    """Appends documents to PREFIX.bin and, in `finish`, writes PREFIX.idx. Document lengths wait in PREFIX.lengths, on disk."""

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._bin = _HashedFile(Path(prefix + ".bin"))
        self._lengths_path = Path(prefix + ".lengths")
        self._lengths = open(self._lengths_path, "wb")  # noqa: SIM115 (closed by finish and discard)

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents of `lengths` (int32 [documents], each at least 1), their ids end to end in `ids` (dtype [tokens])."""
        assert ids.dtype == self.dtype and lengths.dtype == np.int32 and len(ids) == lengths.sum(dtype=np.int64)
        self._bin.write(ids.tobytes())
        self._lengths.write(lengths.tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> Written:
        """Write the index, flush both files to disk and close them."""
        self._lengths.close()
        index = _HashedFile(Path(self.prefix + ".idx"))
        index.write(_HEADER.pack(_MAGIC, 1, _DTYPE_CODES[self.dtype.name], self.documents, self.documents + 1))
        for lengths in self._stored_lengths():
            index.write(lengths.tobytes())
        start = 0
        for lengths in self._stored_lengths():
            ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate(([start], ends[:-1])).astype(np.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, self.documents + 1), dtype=np.int64).tobytes())
        bin_hash, idx_hash = self._bin.close(), index.close()
        self._lengths_path.unlink()
        return Written(self.documents, self.tokens, self._bin.size, index.size, bin_hash, idx_hash)

    def discard(self) -> None:
        """Close and delete everything, at any time."""
        for stream in (self._bin.stream, self._lengths):
            with contextlib.suppress(OSError):  # a full disk: the buffer cannot be flushed, and is not wanted
                stream.close()
        for suffix in (".bin", ".idx", ".lengths"):
            Path(self.prefix + suffix).unlink(missing_ok=True)

    def _stored_lengths(self) -> Iterator[np.ndarray]:
        with open(self._lengths_path, "rb") as stream:
            while len(chunk := np.fromfile(stream, dtype=np.int32, count=_CHUNK)):
                yield chunk


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.stream = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.size = 0
        self._digest = content_hash()

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def close(self) -> str:
        """Bring the file to the disk; its hash."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return self._digest.hexdigest()

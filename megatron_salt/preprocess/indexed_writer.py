"""Writes and copies Megatron's .bin/.idx in constant memory: byte for byte what mcore's IndexedDatasetBuilder writes.

data/indexed_dataset.py defines the format. One document is one sequence. Both files are hashed while they are written.
numpy and the standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_salt.data.indexed_dataset import BOUNDARY_BYTES, DTYPES, HEADER, LENGTH_BYTES, MAGIC, POINTER_BYTES, VERSION
from megatron_salt.data.manifest import content_hash
from megatron_salt.errors import UserError

_DTYPE_CODES = {name: code for code, name in DTYPES.items() if name in ("int32", "uint16")}
DIGEST_BYTES = 16  # of the hash of a document
_READ_BYTES = 1 << 22
_BATCH_DOCUMENTS, _BATCH_TOKENS = 1 << 16, 1 << 20  # in memory of a reader at a time; one long document may be more
_CHUNK = 1 << 20  # documents whose index entries are in memory at a time


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The type in which Megatron stores token ids: uint16 for a vocabulary below 65,500, else int32."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The files that a finished writer left: sizes, and blake2b-256 hashes in hexadecimal."""

    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_hash: str
    idx_hash: str


@dataclass(frozen=True)
class Mark:
    """How far a writer is. Another process can go on from there with a new IndexedWriter."""

    documents: int
    tokens: int
    hashes: tuple[str, ...]
    """Hash of each file up to here."""


class IndexedWriter:
    """Appends documents to PREFIX.bin; `finish` writes PREFIX.idx.

    Until then the lengths of the documents are in PREFIX.lengths. Hashes of documents, if kept, are in PREFIX.digests.
    """

    def __init__(self, prefix: str, dtype: np.dtype, mark: Mark | None = None, digests: bool = False) -> None:
        """mark: go on from there with the files of an earlier writer; what it wrote after the mark is cut off.

        UserError when the files are not what the mark says.
        """
        self.prefix = prefix
        self.dtype = dtype
        self.documents = mark.documents if mark else 0
        self.tokens = mark.tokens if mark else 0
        sizes = {".bin": self.tokens * dtype.itemsize, ".lengths": self.documents * LENGTH_BYTES}
        if digests:
            sizes[".digests"] = self.documents * DIGEST_BYTES
        hashes = mark.hashes if mark else [None] * len(sizes)
        self._files = {
            suffix: _HashedFile(Path(prefix + suffix), size if mark else None, expected)
            for (suffix, size), expected in zip(sizes.items(), hashes, strict=True)
        }

    def append(self, ids: np.ndarray, lengths: np.ndarray, digests: np.ndarray | None = None) -> None:
        """Add documents. ids: of all of them end to end, dtype [tokens]. lengths: int32 [documents], each at least 1.

        digests: uint64 [documents, 2], if they are kept.
        """
        assert ids.dtype == self.dtype and lengths.dtype == np.int32 and len(ids) == lengths.sum(dtype=np.int64)
        self._files[".bin"].write(ids.tobytes())
        self._files[".lengths"].write(lengths.tobytes())
        if digests is not None:
            assert digests.shape == (len(lengths), 2)
            self._files[".digests"].write(digests.tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def mark(self) -> Mark:
        """Bring everything to the disk; how far it is."""
        return Mark(self.documents, self.tokens, tuple(file.sync() for file in self._files.values()))

    def finish(self) -> Written:
        """Write the index, bring both files to the disk, close them, and delete the other files."""
        written = self.write_index()
        for suffix in self._files.keys() - {".bin"}:
            Path(self.prefix + suffix).unlink()
        return written

    def write_index(self) -> Written:
        """The same, but keep the other files, so that another process can do it again."""
        hashes = {suffix: file.close() for suffix, file in self._files.items()}
        index = _HashedFile(Path(self.prefix + ".idx"))
        index.write(HEADER.pack(MAGIC, VERSION, _DTYPE_CODES[self.dtype.name], self.documents, self.documents + 1))
        for lengths in self.stored_lengths():
            index.write(lengths.tobytes())
        start = 0
        for lengths in self.stored_lengths():
            ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate(([start], ends[:-1])).astype(np.int64).tobytes())
            start = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, self.documents + 1), dtype=np.int64).tobytes())
        idx_hash = index.close()
        return Written(
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self._files[".bin"].size,
            idx_bytes=index.size,
            bin_hash=hashes[".bin"],
            idx_hash=idx_hash,
        )

    def discard(self) -> None:
        """Close and delete all files, at any time."""
        self.close()
        for suffix in (".bin", ".idx", ".lengths", ".digests"):
            Path(self.prefix + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files, and leave them to a later writer."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: the buffer cannot be flushed, and nobody needs it
                file.stream.close()

    def stored_lengths(self) -> Iterator[np.ndarray]:
        """Lengths of the documents up to the last mark, or all of a closed writer: int32, _CHUNK at a time."""
        with open(self.prefix + ".lengths", "rb") as stream:
            while len(chunk := np.fromfile(stream, dtype=np.int32, count=_CHUNK)):
                yield chunk


class IndexedReader:
    """Reads PREFIX.bin and PREFIX.idx once, in order, in constant memory, and hashes both. A document is one sequence."""

    def __init__(self, prefix: str, dtype: np.dtype, documents: int) -> None:
        """dtype, documents: as `TokenFile` read them from the header. UserError for a dataset that an IndexedWriter cannot write."""
        self.prefix = prefix
        self.dtype = dtype
        self.documents = documents
        self.bin_hash, self.idx_hash = "", ""
        """Hashes of the files, after everything was read."""
        with open(prefix + ".idx", "rb") as stream:
            _, _, _, sequences, boundaries = HEADER.unpack(stream.read(HEADER.size))
        if dtype.name not in _DTYPE_CODES or sequences != documents or boundaries != documents + 1:
            raise UserError(
                f"--input {prefix} has {sequences} sequences of {dtype.name} in {documents} documents; only documents of one "
                f"sequence each can be copied, in {' or '.join(_DTYPE_CODES)}"
            )

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids end to end, int32 lengths) of consecutive documents. UserError when the files contradict each other."""
        digest, start = content_hash(), 0
        with open(self.prefix + ".bin", "rb") as tokens:
            for lengths, pointers, boundaries in self._index():
                ends = start + np.cumsum(lengths, dtype=np.int64)
                begins = np.concatenate(([start], ends[:-1]))
                first = int(boundaries[0])
                if (
                    (len(lengths) and lengths.min() < 0)
                    or not np.array_equal(pointers, begins * self.dtype.itemsize)
                    or not np.array_equal(boundaries, np.arange(first, first + len(lengths) + 1))
                ):
                    raise UserError(
                        f"--input {self.prefix}.idx is damaged: its documents from number {first} on do not lie end to end"
                    )
                cuts = np.flatnonzero(np.diff((ends - start) // _BATCH_TOKENS)) + 1
                for some in np.split(lengths, cuts):
                    ids = np.fromfile(tokens, self.dtype, int(some.sum(dtype=np.int64)))
                    digest.update(ids.tobytes())
                    if len(ids) < some.sum(dtype=np.int64):
                        raise UserError(f"--input {self.prefix}.bin is shorter than its index says")
                    yield ids, some
                start = int(ends[-1])
        self.bin_hash = digest.hexdigest()
        with open(self.prefix + ".idx", "rb") as stream:
            self.idx_hash = hashlib.file_digest(stream, content_hash).hexdigest()

    def _index(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(int32 lengths [n], int64 offsets [n], int64 boundaries [n + 1]) of up to _BATCH_DOCUMENTS documents at a time."""
        pointers_at = HEADER.size + LENGTH_BYTES * self.documents
        boundaries_at = pointers_at + POINTER_BYTES * self.documents
        with open(self.prefix + ".idx", "rb") as stream:
            for first in range(0, self.documents, _BATCH_DOCUMENTS):
                count = min(_BATCH_DOCUMENTS, self.documents - first)
                arrays = []
                for kind, at, extra in (
                    (np.int32, HEADER.size + LENGTH_BYTES * first, 0),
                    (np.int64, pointers_at + POINTER_BYTES * first, 0),
                    (np.int64, boundaries_at + BOUNDARY_BYTES * first, 1),
                ):
                    stream.seek(at)
                    arrays.append(np.fromfile(stream, kind, count + extra))
                yield arrays[0], arrays[1], arrays[2]


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path, size: int | None = None, expected: str | None = None) -> None:
        """size: keep so many bytes of an existing file; their hash must be `expected`. None: a new file."""
        self.size = 0
        self.stream: BinaryIO
        self._digest = content_hash()
        if size is None:
            self.stream = open(path, "wb")  # noqa: SIM115 (closed by close)
            return
        try:
            self.stream = open(path, "r+b")  # noqa: SIM115
        except FileNotFoundError:
            raise UserError(f"--resume: {path} is gone; --overwrite starts anew") from None
        while self.size < size and (block := self.stream.read(min(_READ_BYTES, size - self.size))):
            self._digest.update(block)
            self.size += len(block)
        if self.size < size or self._digest.hexdigest() != expected:
            self.stream.close()
            raise UserError(f"--resume: {path} is not what the killed run wrote; --overwrite starts anew")
        self.stream.truncate(size)
        self.stream.seek(size)

    def write(self, data: bytes) -> None:
        self.stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def sync(self) -> str:
        """Bring the file to the disk; the hash of its bytes so far."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return self._digest.hexdigest()

    def close(self) -> str:
        """Bring the file to the disk and close it; its hash."""
        digest = self.sync()
        self.stream.close()
        return digest

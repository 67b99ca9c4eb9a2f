"""The files with hidden states: how they are written, found and read. Pure; nothing here communicates.

A shard is a file, little-endian throughout:
- its kind, the shape of a sample (`_kind`), the cache that it belongs to (32 bytes, `CacheManifest.key`), int64 n, and uint32: the
  checksum of all that is before the hidden states, without itself;
- int64 [n]: global ids of its samples;
- uint32 [n, segments]: checksums of each sample's segments, which are equal parts of the sequence;
- [n, L, h]: hidden states, float32, or the bits of bfloat16.

It is written under a temporary name and renamed when it is complete, and it never changes after that. So any number of runs may write and
read one directory. Two shards may hold the same sample; then one of them is read. A rank reads the segments that it needs, and verifies
each of them.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.files import reading, whole_file

SUFFIX = ".shard"
MOST_SEGMENTS = 32
_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


@dataclass(frozen=True)
class SampleShape:
    """The hidden states of one sample."""

    seq_length: int
    hidden_size: int
    dtype: str
    """float32 or bfloat16."""
    cache: str = ""
    """Hex digest of what the hidden states are, `CacheManifest.key`: files of another cache are refused."""

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of the arrays on disk and of `read_rows`; the bits of bfloat16 are uint16."""
        return _DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.hidden_size * self.numpy_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample."""
        return self.seq_length * self.row_bytes

    @property
    def segments(self) -> int:
        """Parts of a sequence with a checksum each: a power of two that divides it."""
        return min(MOST_SEGMENTS, self.seq_length & -self.seq_length)


@dataclass(frozen=True)
class Shard:
    """A shard whose lists have been read."""

    path: Path
    ids: np.ndarray
    """int64 [n]"""
    sums: np.ndarray
    """uint32 [n, segments]"""
    offset: int
    """Bytes before the hidden states."""


def write_shard(directory: Path, ids: np.ndarray, samples: np.ndarray, shape: SampleShape) -> Path:
    """Write a shard, durably, so that it appears whole or not at all. Raises OSError.

    ids: int64 [n]. samples: [n, L, h] of `shape.numpy_dtype`.
    """
    assert samples.shape == (len(ids), shape.seq_length, shape.hidden_size) and samples.dtype == shape.numpy_dtype, (
        samples.shape
    )
    path, samples = directory / f"{uuid.uuid4().hex}{SUFFIX}", np.ascontiguousarray(samples)
    parts = samples.reshape(len(ids), shape.segments, -1)
    sums = np.array(
        [[segment_sum(part.data, sample, at) for at, part in enumerate(of)] for sample, of in zip(ids, parts, strict=True)]
    )
    begin = _kind(shape) + _key(shape) + struct.pack("<q", len(ids))
    lists = np.ascontiguousarray(ids, "<i8").tobytes() + sums.astype("<u4").tobytes()
    with whole_file(path, durable=True) as temporary, open(temporary, "wb") as file:
        file.write(begin + struct.pack("<I", zlib.crc32(lists, zlib.crc32(begin))) + lists)
        file.write(samples.data)
    return path


def segment_sum(content: memoryview, sample: int, segment: int) -> int:
    """Checksum of one segment of a sample: another one in another place."""
    return zlib.crc32(content, zlib.crc32(struct.pack("<qI", sample, segment)))


def shard_names(directory: Path) -> list[str]:
    """Names of the complete shards of a cache, in order."""
    return sorted(path.name for path in directory.glob(f"*{SUFFIX}"))


def open_shard(path: Path, shape: SampleShape) -> Shard:
    """Read the lists of a shard. UserError, naming the file, where it is damaged or not of this shape."""
    kind, key = _kind(shape), _key(shape)
    with reading(path, "--teacher-cache: "), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin, rest = file.read(len(kind) + len(key) + 8), file.read(4)
        if len(rest) < 4 or not begin.startswith(kind):
            raise _damaged(path, f"it does not begin as a file of samples of {shape}")
        (count,), (total,) = struct.unpack("<q", begin[len(kind) + len(key) :]), struct.unpack("<I", rest)
        each = 8 + 4 * shape.segments
        offset = len(begin) + 4 + count * each
        if size != offset + count * shape.num_bytes:
            raise _damaged(path, f"it has {size} bytes and should have {offset + count * shape.num_bytes}")
        lists = file.read(count * each)
    if zlib.crc32(lists, zlib.crc32(begin)) != total:
        raise _damaged(path, "its lists are not what was written")
    if not begin[len(kind) :].startswith(key):
        raise UserError(
            f"--teacher-cache: {path} belongs to another cache: its teacher or data are others, or it was computed in another way; "
            "move the file away"
        )
    sums = np.frombuffer(lists, "<u4", offset=8 * count).reshape(count, shape.segments)
    return Shard(path, np.frombuffer(lists, "<i8", count), sums, offset)


class Index:
    """Where each sample of a cache lies, as of one moment. Immutable."""

    def __init__(self, shards: Sequence[Shard], shape: SampleShape) -> None:
        self.shards, self.shape = tuple(shards), shape
        sizes = [len(shard.ids) for shard in shards]
        every = np.concatenate([np.empty(0, np.int64), *(shard.ids for shard in shards)])
        self._ids, first = np.unique(every, return_index=True)
        self._shard = np.repeat(np.arange(len(sizes)), sizes)[first]
        self._row = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])[first]

    def __len__(self) -> int:
        return len(self._ids)

    def has(self, ids: np.ndarray) -> np.ndarray:
        """Which samples the cache holds: int64 [n] -> bool [n]."""
        if not len(self._ids):
            return np.zeros(ids.shape, bool)
        return self._ids[np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)] == ids

    def read(self, ids: np.ndarray, slices: Iterable[slice], out: np.ndarray) -> int:
        """Read these positions of samples that the cache holds. Returns the bytes that were read from disk.

        ids: int64 [n]. out: [n, positions, h], written. UserError, naming the file, where a segment is damaged.
        """
        slices, count = list(slices), 0
        place = np.searchsorted(self._ids, ids)
        assert self.has(ids).all(), ids
        for number in np.unique(self._shard[place]).tolist():
            shard = self.shards[number]
            with reading(shard.path, "--teacher-cache: "), open(shard.path, "rb", buffering=0) as file:
                for at in np.flatnonzero(self._shard[place] == number).tolist():
                    count += _read_sample(file.fileno(), shard, int(self._row[place[at]]), self.shape, slices, out[at])
        return count


def _read_sample(descriptor: int, shard: Shard, row: int, shape: SampleShape, slices: Sequence[slice], out: np.ndarray) -> int:
    """Read positions of one sample into out, [positions, h]. Returns the bytes that were read."""
    length, count, done = shape.seq_length // shape.segments, 0, 0
    for wanted in slices:
        first, end = wanted.start // length, -(-wanted.stop // length)
        size = length * shape.row_bytes
        content = os.pread(descriptor, (end - first) * size, shard.offset + row * shape.num_bytes + first * size)
        view = memoryview(content)
        for number in range(first, end):
            part = view[(number - first) * size : (number - first + 1) * size]
            if len(part) != size or segment_sum(part, int(shard.ids[row]), number) != shard.sums[row, number]:
                raise _damaged(shard.path, f"sample {shard.ids[row]} is not what was written, positions {number * length} on")
        rows = np.frombuffer(content, shape.numpy_dtype).reshape(-1, shape.hidden_size)
        positions = wanted.stop - wanted.start
        out[done : done + positions] = rows[wanted.start - first * length :][:positions]
        done, count = done + positions, count + len(content)
    return count


def _kind(shape: SampleShape) -> bytes:
    """How every shard of samples of this shape begins."""
    sizes = struct.pack("<III", shape.seq_length, shape.hidden_size, shape.segments)
    return b"teacher cache 1\n" + shape.dtype.encode().ljust(16) + sizes


def _key(shape: SampleShape) -> bytes:
    return bytes.fromhex(shape.cache).ljust(32, b"\0")


def _damaged(path: Path, how: str) -> UserError:
    return UserError(
        f"--teacher-cache: {path} is damaged: {how}; delete the file, and its samples are computed by the teacher again"
    )

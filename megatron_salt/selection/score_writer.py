"""Writing one shard of a score index, block by block. A kill at any byte loses at most the block that was being written.

The format is that of `score_format.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_salt.data.manifest import content_hash
from megatron_salt.errors import UserError
from megatron_salt.files import try_lock
from megatron_salt.selection.score_format import (
    JOURNAL,
    SHARD,
    IndexManifest,
    column_path,
    columns,
    npy_header,
    samples_of,
    shard_path,
    shard_paths,
    write_shard_manifest,
)  # fmt: skip

_DIGEST_BYTES = 16


class ShardWriter:
    """Fills the shard of `blocks` in an index that `claim` made. One process writes a shard. Blocks that an earlier job finished stay.

    Disk errors are OSErrors that name the file.
    """

    def __init__(self, directory: Path, manifest: IndexManifest, blocks: range) -> None:
        """UserError where another process is writing this shard, or where the index has other shards that overlap it."""
        self._manifest, self._blocks = manifest, blocks
        self._columns = columns(manifest.top_k, manifest.seq_length)
        self._first, self._end = samples_of(manifest, blocks)
        self.path = shard_path(directory, manifest, blocks)
        self.todo: list[int] = []
        """Blocks that are not finished, ascending."""
        self._files: dict[str, int] = {}  # open file descriptors, by column
        self._closing = contextlib.ExitStack()
        weakref.finalize(self, self._closing.close)
        if blocks:
            self._refuse_overlap(directory)
            self._open()

    def write(self, block: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write a block's rows; they are on disk when this returns. rows: every column, one value for each sample of the block."""
        first, end = samples_of(self._manifest, range(block, block + 1))
        assert block in self._blocks and set(rows) == set(self._columns), (block, self._blocks, sorted(rows))
        assert all(values.shape == (end - first,) for values in rows.values()), (
            first,
            end,
            {n: v.shape for n, v in rows.items()},
        )
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name, dtype in self._columns.items():
            data = np.ascontiguousarray(rows[name], dtype).tobytes()
            digest.update(data)
            self._write(name, data, self._offset(name, first))
        for name in (*self._columns, JOURNAL):  # the journal comes last: its digest stands for data that is on disk
            if name == JOURNAL:
                self._write(JOURNAL, digest.digest(), _DIGEST_BYTES * (block - self._blocks.start))
            with self._naming(name):
                os.fsync(self._files[name])
        if block in self.todo:
            self.todo.remove(block)

    def finish(self) -> None:
        """Hash the columns and mark the shard as finished. Every block must have been written."""
        assert not self.todo, self.todo
        if self._files:
            hashes = {}
            for name in self._columns:
                with open(column_path(self.path, name), "rb") as stream:
                    hashes[name] = hashlib.file_digest(stream, content_hash).hexdigest()
            write_shard_manifest(self.path, self._manifest, self._first, self._end, hashes)
            (self.path / JOURNAL).unlink()
            self.close()

    def close(self) -> None:
        """Close the files and release the lock."""
        self._files.clear()
        self._closing.close()

    def _refuse_overlap(self, directory: Path) -> None:
        for first, end, path in shard_paths(directory):
            if path != self.path and first < self._end and self._first < end:
                raise UserError(
                    f"--output {directory} holds {path.name}, which overlaps {self.path.name}: give every job the same "
                    "n in --shard i/n, or delete the shards of the other division"
                )

    def _open(self) -> None:
        """Lock the shard, make the files that are missing, and find the blocks that are not whole."""
        self.path.mkdir(exist_ok=True)
        self._open_file(JOURNAL, self.path / JOURNAL, b"", _DIGEST_BYTES * len(self._blocks))
        if (self.path / SHARD).exists():
            (self.path / JOURNAL).unlink(missing_ok=True)  # left by a job that was killed right at its end
            self.close()
            return
        for name, dtype in self._columns.items():
            header = npy_header(dtype, self._end - self._first)
            self._open_file(
                name, column_path(self.path, name), header, len(header) + (self._end - self._first) * dtype.itemsize
            )
        self.todo = [block for block in self._blocks if not self._is_whole(block)]

    def _open_file(self, name: str, path: Path, header: bytes, size: int) -> None:
        """Open a file, make it `size` bytes long (new bytes read as zeros), and lock it if it is the journal."""
        with self._naming(name):
            self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._closing.callback(os.close, self._files[name])
            if name == JOURNAL:
                self._lock()
            os.ftruncate(self._files[name], size)
        self._write(name, header, 0)

    def _lock(self) -> None:
        if not try_lock(self._files[JOURNAL]):
            raise UserError(f"{self.path} is being written by another process: give each job a --shard of its own")

    def _is_whole(self, block: int) -> bool:
        """Whether the columns match the digest that the journal holds."""
        recorded = os.pread(self._files[JOURNAL], _DIGEST_BYTES, _DIGEST_BYTES * (block - self._blocks.start))
        if recorded == bytes(_DIGEST_BYTES):
            return False
        first, end = samples_of(self._manifest, range(block, block + 1))
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name, dtype in self._columns.items():
            digest.update(os.pread(self._files[name], (end - first) * dtype.itemsize, self._offset(name, first)))
        return digest.digest() == recorded

    def _offset(self, name: str, sample: int) -> int:
        dtype = self._columns[name]
        return len(npy_header(dtype, self._end - self._first)) + (sample - self._first) * dtype.itemsize

    def _write(self, name: str, data: bytes, offset: int) -> None:
        with self._naming(name):
            done = 0
            while done < len(data):
                done += os.pwrite(self._files[name], data[done:], offset + done)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Add the file's path to an OSError."""
        try:
            yield
        except OSError as error:
            path = self.path / JOURNAL if name == JOURNAL else column_path(self.path, name)
            raise OSError(error.errno, error.strerror, str(path)) from error

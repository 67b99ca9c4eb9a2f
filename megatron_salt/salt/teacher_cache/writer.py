"""Writes what this rank's teacher computes into shards, in a thread beside the training.

Of the ranks that hold the same hidden states one writes them (`Teacher.hidden_states`), so nothing is written twice in a step. The samples
of one forward pass of the teacher go into one shard: after a kill a later run finds all of them or none, and computes them in the same
company, which keeps the bits.

An error of the disk does not stop the training. It is reported once, by the rank that has it, and the rank writes no more.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_salt.parallel.device import begin_to_host
from megatron_salt.salt.teacher_cache.shards import Index, SampleShape, write_shard

SHARD_BYTES = 64 << 20
MOST_WAITING = 4 * SHARD_BYTES
"""Bytes that may wait for the disk. Where it is slower than the teacher, the training waits for it."""


class CacheWriter:
    """Collects hidden states and writes a shard whenever there are enough. `keep` and `finish` are called from one thread."""

    def __init__(self, directory: Path, index: Index, shard_bytes: int = SHARD_BYTES) -> None:
        """index: what need not be written again. The thread starts with the first sample."""
        self._directory, self._index, self._shard_bytes = directory, index, shard_bytes
        self._kept: set[int] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._ids: list[np.ndarray] = []  # from here on the thread's own
        self._samples: list[np.ndarray] = []
        self._failed = False
        self.num_samples, self.num_bytes, self.seconds = 0, 0, 0.0
        """What is on disk, and how long the thread took. Read them after `finish`."""

    def keep(self, sample_ids: np.ndarray, hidden: Tensor) -> None:
        """Take the hidden states of one forward pass: [L, n, h], of samples int64 [n]. Waits neither for the device nor, as long as it
        keeps up, for the disk."""
        assert hidden.shape[::2] == (self._index.shape.seq_length, self._index.shape.hidden_size), hidden.shape
        if self._failed:
            return
        rows = self._new_rows(sample_ids)
        if not rows:
            return
        copy, wait = begin_to_host(hidden.transpose(0, 1))
        while self._waiting and (
            self._waiting[0][1].done() or sum(size for size, _ in self._waiting) + copy.nbytes > MOST_WAITING
        ):
            self._waiting.popleft()[1].result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer of the teacher's cache")
        self._waiting.append((copy.nbytes, self._thread.submit(self._add, sample_ids[rows], rows, copy, wait)))

    def _new_rows(self, sample_ids: np.ndarray) -> list[int]:
        """Rows of the samples that are neither in the cache nor kept before; from now on they count as kept."""
        rows = []
        for row, sample in enumerate(sample_ids.tolist()):
            if sample not in self._kept:
                self._kept.add(sample)
                rows.append(row)
        known = self._index.has(sample_ids[rows])
        return [row for row, is_known in zip(rows, known.tolist(), strict=True) if not is_known]

    def finish(self) -> None:
        """Write what is left, and end the thread. More samples may follow; they start another one."""
        if self._thread is not None:
            self._waiting.append((0, self._thread.submit(self._write)))
            while self._waiting:
                self._waiting.popleft()[1].result()
            self._thread.shutdown()
            self._thread = None

    def _add(self, ids: np.ndarray, rows: list[int], copy: Tensor, wait: Callable[[], None]) -> None:
        wait()
        self._ids.append(ids)
        self._samples.append(as_bits(copy, self._index.shape)[rows])
        if sum(len(some) for some in self._ids) * self._index.shape.num_bytes >= self._shard_bytes:
            self._write()

    def _write(self) -> None:
        """Write the samples that have been collected as one shard. In the thread."""
        started = time.perf_counter()
        ids, samples = self._ids, self._samples
        self._ids, self._samples = [], []
        if not ids or self._failed:
            return
        try:
            path = write_shard(self._directory, np.concatenate(ids), np.concatenate(samples), self._index.shape)
        except OSError as error:
            self._failed = True
            print(
                f"warning: --teacher-cache {self._directory} cannot be written ({error.strerror or error}); the training goes on, and this "
                "rank adds no more to it; what is there stays good",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return
        self.num_samples += sum(len(some) for some in ids)
        self.num_bytes += path.stat().st_size
        self.seconds += time.perf_counter() - started


def as_bits(hidden: Tensor, shape: SampleShape) -> np.ndarray:
    """The memory of a tensor on the CPU as an array of `shape.numpy_dtype`."""
    assert str(hidden.dtype) == f"torch.{shape.dtype}", (hidden.dtype, shape)
    bits = hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden
    return bits.numpy().view(shape.numpy_dtype)

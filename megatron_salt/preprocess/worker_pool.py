"""Chunks of text to token ids in several processes.

Chunks come back in the order in which they went in, so the result does not depend on the number of workers. Workers parse and encode.
Neither text nor ids pass through a pickle: a worker reads the chunk of a plain file itself, and everything else lies in slots. A slot
is a file in memory that both sides hold open. A few slots per worker bound the memory.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.reduction import DupFd

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.preprocess.encode import EncodedChunk, Encoder, EncoderSettings
from megatron_salt.preprocess.readers import Chunk
from megatron_salt.preprocess.tokenizer_backends import resident_bytes
from megatron_salt.tokenizer.document_ends import Ends
from megatron_salt.tokenizer.tokenizer import tokenizer_from_files

SLOTS_PER_WORKER = 3  # how far workers are ahead of the consumer
_SMALLEST_CHUNK = 1 << 16
_WORKING_BYTES = 96 << 20  # memory of a worker for the tokenizer, its caches and its results


@dataclass(frozen=True)
class SizeLimits:
    """Bytes of text that are in memory as one piece. Each piece is there several times: as text, ids and lengths."""

    chunk: int
    """Bytes of a chunk of short documents."""
    document: int
    """Bytes that one document may have."""


def fit_memory(limits: SizeLimits, max_memory: float | None, workers: int) -> SizeLimits:
    """`limits`, lowered until all processes together stay below `max_memory` GiB. None: no bound.

    UserError where `max_memory` is too little for these workers.
    """
    if max_memory is None:
        return limits
    processes = workers + (workers > 1)
    fixed = processes * resident_bytes() + workers * _WORKING_BYTES
    copies = workers * (3 * SLOTS_PER_WORKER + 8)  # text, ids and lengths in each slot; 8 in the worker itself
    size = int(max_memory * 2**30 - fixed) // copies
    if size < _SMALLEST_CHUNK:
        raise UserError(
            f"--max-memory {max_memory:g} GiB is too little for --workers {workers}, which take "
            f"{(fixed + copies * _SMALLEST_CHUNK) / 2**30:.2f} GiB; give more, or fewer workers"
        )
    return SizeLimits(min(size, limits.chunk), min(size, limits.document))


class Slots:
    """Files in memory that carry bytes to a worker and arrays back. A process receives them when it starts."""

    def __init__(self, descriptors: list[int]) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple:
        return _attach, ([DupFd(descriptor) for descriptor in self.descriptors],)

    def put(self, slot: int, parts: Iterable[bytes | np.ndarray]) -> None:
        """Replace the contents of a slot by `parts`, end to end."""
        descriptor, at = self.descriptors[slot], 0
        for part in parts:
            left = memoryview(part if isinstance(part, bytes) else part.tobytes())
            while left:
                done = os.pwrite(descriptor, left, at)
                at, left = at + done, left[done:]
        os.ftruncate(descriptor, at)

    def take(self, slot: int, size: int, offset: int = 0) -> bytes:
        """`size` bytes of a slot from `offset` on."""
        data = os.pread(self.descriptors[slot], size, offset)
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.pread(self.descriptors[slot], size - len(data), offset + len(data))
            assert more, (slot, size, offset)
            data += more
        return data


def _attach(duplicates: list) -> Slots:
    return Slots([duplicate.detach() for duplicate in duplicates])


_encoder: Encoder  # of a worker process, set once by _start_worker: a tokenizer is too large to travel with each chunk
_slots: Slots


def _start_worker(
    slots: Slots,
    kind: str,
    files: Mapping[str, bytes],
    ends: Ends,
    matches_special: bool,
    settings: EncoderSettings,
) -> None:
    global _encoder, _slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _slots = slots
    tokenizer = tokenizer_from_files(kind, files, "the tokenizer", ends, matches_special)
    _encoder = Encoder(tokenizer, settings)


def _die_with_parent() -> None:
    """End this worker when its parent is killed. A worker holds both ends of the pipe it waits on, so it would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk, slot: int, size: int) -> tuple[EncodedChunk, list[tuple[int, int]]]:
    """(the result without its arrays, which lie in the slot; per key (number of ids, number of documents)).

    size: bytes of text in the slot; -1: the chunk is a range of a file.
    """
    if size >= 0:
        chunk = replace(chunk, data=_slots.take(slot, size))
    encoded = _encoder.encode(chunk)
    del chunk
    _slots.put(slot, itertools.chain(encoded.ids, encoded.lengths, encoded.digests))
    shape = [(len(ids), len(lengths)) for ids, lengths in zip(encoded.ids, encoded.lengths, strict=True)]
    return replace(encoded, ids=[], lengths=[], digests=[]), shape


def encode_chunks(chunks: Iterable[Chunk], encoder: Encoder, workers: int, dtype: np.dtype) -> Generator[EncodedChunk]:
    """Encode in order, in this process if `workers` is 1. At most SLOTS_PER_WORKER chunks per worker are in memory.

    Close the generator to stop early. UserError when a worker dies.
    """
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    with ExitStack() as stack:
        slots = Slots([os.memfd_create("slot") for _ in range(workers * SLOTS_PER_WORKER)])
        for descriptor in slots.descriptors:
            stack.callback(os.close, descriptor)
        tokenizer = encoder.tokenizer
        worker_facts = (slots, tokenizer.kind, tokenizer.files, tokenizer.ends, tokenizer.matches_special, encoder.settings)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, worker_facts)
        stack.callback(pool.shutdown, cancel_futures=True)
        free, pending = deque(range(len(slots.descriptors))), deque[tuple[int, Future]]()
        try:
            for chunk in chunks:
                slot, size = free.popleft(), -1
                if chunk.data is not None:
                    slots.put(slot, [chunk.data])
                    size = len(chunk.data)
                pending.append((slot, pool.submit(_encode_in_worker, replace(chunk, data=None), slot, size)))
                del chunk
                while pending and (not free or pending[0][1].done()):
                    yield _received(slots, *pending[0], encoder.settings.digests, dtype)
                    free.append(pending.popleft()[0])
            while pending:
                yield _received(slots, *pending[0], encoder.settings.digests, dtype)
                free.append(pending.popleft()[0])
        except BrokenProcessPool:
            raise UserError(f"a worker died, most likely for lack of memory; --workers {workers} may be too many") from None


def _received(slots: Slots, slot: int, future: Future, digests: bool, dtype: np.dtype) -> EncodedChunk:
    """A worker's result with its arrays."""
    encoded, shape = future.result()
    at = 0

    def array(kind: np.dtype, count: int) -> np.ndarray:
        nonlocal at
        data = slots.take(slot, kind.itemsize * count, at)
        at += len(data)
        return np.frombuffer(data, kind)

    ids = [array(dtype, count) for count, _ in shape]
    lengths = [array(np.dtype(np.int32), count) for _, count in shape]
    hashes = [array(np.dtype("<u8"), 2 * count).reshape(-1, 2) for _, count in shape] if digests else []
    return replace(encoded, ids=ids, lengths=lengths, digests=hashes)

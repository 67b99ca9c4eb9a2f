"""Chunks of text to ids, in this process or in several.

What a chunk becomes is a pure function of its bytes, the tokenizer, the keys, append_eod and prepend_bos, and chunks come back in the order
in which they went in: the result does not depend on the number of workers. Workers parse and encode. Text and ids never pass
through a pickle: a chunk of a plain file is read by its worker, other text and all ids lie in slots, files in memory that
both sides hold open; a few slots per worker bound what is in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.reduction import DupFd

import numpy as np

from megatron_salt.errors import UserError
from megatron_salt.preprocess.indexed_writer import token_dtype
from megatron_salt.preprocess.parse import Parsed, Parser
from megatron_salt.preprocess.readers import Chunk
from megatron_salt.preprocess.tokenizer_backends import Backend, encode_with, resident_bytes
from megatron_salt.tokenizer.document_ends import Ends
from megatron_salt.tokenizer.special_tokens import Finder, Found
from megatron_salt.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

SLOTS_PER_WORKER = 3  # read ahead of the consumer
_SMALLEST_CHUNK = 1 << 16
_MOST_TOKENS = (1 << 31) - 2  # of a document, whose end-of-document id comes on top
_WORKING_BYTES = 96 << 20  # what a tokenizer, its caches and its results take in a worker
_TEXT_AT_A_TIME = 1 << 18  # characters: what a tokenizer holds besides ids is many times its text


@dataclass(frozen=True)
class EncodedChunk:
    """What one chunk became."""

    chunk: Chunk
    """Without its bytes."""
    lines: int
    """Lines, or rows, blank ones included."""
    documents: int
    """Lines that are not blank."""
    bad: list[tuple[int, str, str]]
    """(line from 0, kind, reason) of each line that was left out."""
    text_bytes: list[int]
    """Per key: size of the texts in UTF-8."""
    ids: list[np.ndarray]
    """Per key: ids of all documents end to end."""
    lengths: list[np.ndarray]
    """Per key: int32 [documents], each at least 1."""
    empty: list[int]
    """Per key: documents without a token."""
    digests: list[np.ndarray]
    """Per key, if asked for: uint64 [documents, 2], a hash of each text."""
    special: list[Found]
    """Per key: what the texts hold of special tokens."""


class Encoder:
    """Chunk -> EncodedChunk: a pure function of the tokenizer and these settings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        backend: Backend,
        keys: Sequence[str],
        append_eod: bool,
        digests: bool,
        prepend_bos: bool = False,
    ) -> None:
        self.settings = (
            tokenizer.kind,
            tokenizer.files,
            tokenizer.ends,
            tokenizer.matches_special,
            backend,
            tuple(keys),
            append_eod,
            prepend_bos,
            digests,
        )
        """What another process makes the same encoder of."""
        self._parse = Parser(keys)
        self.backend = backend
        self._encode = encode_with(tokenizer, backend)
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        self._eod = tokenizer.eod if append_eod else None
        self._bos = tokenizer.bos if prepend_bos else None
        self._digests = digests
        self._find = Finder(tokenizer.special)
        self._tokenizer = tokenizer
        self._is_forbidden = np.zeros(tokenizer.vocabulary_size, np.bool_)
        self._is_forbidden[list(tokenizer.forbidden)] = True
        assert (self._eod is not None or not append_eod) and (self._bos is not None or not prepend_bos)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """UserError when the chunk's file cannot be read."""
        parsed = self._parse(chunk.form, chunk.read())
        columns = [self._encode_column(chunk, texts) for texts in parsed.texts]
        return EncodedChunk(
            replace(chunk, data=None),
            parsed.lines,
            parsed.documents,
            parsed.bad,
            [sum(len(text.encode()) for text in texts) for texts in parsed.texts],
            [ids for ids, _, _ in columns],
            [lengths for _, lengths, _ in columns],
            [len(texts) - len(lengths) for texts, (_, lengths, _) in zip(parsed.texts, columns, strict=True)],
            self._hash(parsed, [full for _, _, full in columns]),
            [self._find(texts) for texts in parsed.texts],
        )

    def _encode_column(self, chunk: Chunk, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of all texts, lengths of those that have any, and which these are."""
        parts, sizes = [np.empty(0, self._dtype)], [np.empty(0, np.int64)]
        for some in _portions(texts):
            ids, lengths = self._encode(some)
            if self._is_forbidden[ids].any():
                self._refuse_forged(some, ids, lengths)
            parts.append(ids.astype(self._dtype))
            sizes.append(lengths)
        ids, every = np.concatenate(parts), np.concatenate(sizes)
        full = every > 0
        if every.max(initial=0) > _MOST_TOKENS:
            raise UserError(
                f"--input {chunk.path}: a document from {chunk.start} on has {every.max()} tokens, more than the "
                f"{_MOST_TOKENS} that Megatron's index can count; cut it"
            )
        lengths = every[full].astype(np.int32)
        if self._bos is not None:
            ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64) - lengths, self._bos)
            lengths += np.int32(1)
        if self._eod is not None:
            ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64), self._eod)
            lengths += np.int32(1)
        return ids, lengths, full

    def _refuse_forged(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        at = int(np.argmax(self._is_forbidden[ids]))
        text = texts[int(np.searchsorted(np.cumsum(lengths), at, side="right"))]
        names = [name for name, i in self._tokenizer.special.items() if i == ids[at]]
        raise UserError(
            f"--special-tokens-in-text split: for {text[:80]!r} the {self._tokenizer.kind} gives {' '.join(map(repr, names))} "
            f"(id {ids[at]}) without being asked; only encode takes this text"
        )

    def _hash(self, parsed: Parsed, full: list[np.ndarray]) -> list[np.ndarray]:
        if not self._digests:
            return []
        return [
            text_digests([text for text, kept in zip(texts, mask, strict=True) if kept])
            for texts, mask in zip(parsed.texts, full, strict=True)
        ]


def text_digests(texts: Sequence[str]) -> np.ndarray:
    """uint64 [texts, 2]: equal for equal texts, and by chance for no others."""
    joined = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(joined, "<u8").reshape(len(texts), 2)


def _portions(texts: list[str]) -> Iterable[list[str]]:
    """The texts in groups of about _TEXT_AT_A_TIME."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _TEXT_AT_A_TIME:
            yield group
            group, size = [], 0
    if group:
        yield group


def chunk_size(max_memory: float | None, workers: int, largest: int) -> int:
    """Bytes of a chunk, `largest` at most, so that all processes stay below `max_memory` GiB (None: as they like). UserError where
    that is too little."""
    if max_memory is None:
        return largest
    processes = workers + (workers > 1)
    fixed = processes * resident_bytes() + workers * _WORKING_BYTES
    copies = workers * (3 * SLOTS_PER_WORKER + 8)  # text, ids and lengths in each slot, and what a worker makes of a chunk
    size = int(max_memory * 2**30 - fixed) // copies
    if size < _SMALLEST_CHUNK:
        raise UserError(
            f"--max-memory {max_memory:g} GiB is too little for --workers {workers}, which take "
            f"{(fixed + copies * _SMALLEST_CHUNK) / 2**30:.2f} GiB; give more, or fewer workers"
        )
    return min(size, largest)


# --- several processes ------------------------------------------------------------------------------------------------


class Slots:
    """Files in memory, for bytes on their way to a worker and for arrays on their way back. Travels to processes at their start."""

    def __init__(self, descriptors: list[int]) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple:
        return _attach, ([DupFd(descriptor) for descriptor in self.descriptors],)

    def put(self, slot: int, parts: Iterable[bytes | np.ndarray]) -> None:
        """Replace what a slot holds."""
        descriptor, at = self.descriptors[slot], 0
        for part in parts:
            left = memoryview(part if isinstance(part, bytes) else part.tobytes())
            while left:
                done = os.pwrite(descriptor, left, at)
                at, left = at + done, left[done:]
        os.ftruncate(descriptor, at)

    def take(self, slot: int, size: int, offset: int = 0) -> bytes:
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
    backend: Backend,
    keys: Sequence[str],
    append_eod: bool,
    prepend_bos: bool,
    digests: bool,
) -> None:
    global _encoder, _slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _slots = slots
    tokenizer = tokenizer_from_files(kind, files, "the tokenizer", ends, matches_special)
    _encoder = Encoder(tokenizer, backend, keys, append_eod, digests, prepend_bos)


def _die_with_parent() -> None:
    """Workers wait on a pipe whose other end they hold too: without this they outlive a killed parent."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk, slot: int, size: int) -> tuple[EncodedChunk, list[tuple[int, int]]]:
    """The result without its arrays, which lie in the slot; per key, how many ids and lengths."""
    if size >= 0:
        chunk = replace(chunk, data=_slots.take(slot, size))
    encoded = _encoder.encode(chunk)
    del chunk
    _slots.put(slot, itertools.chain(encoded.ids, encoded.lengths, encoded.digests))
    shape = [(len(ids), len(lengths)) for ids, lengths in zip(encoded.ids, encoded.lengths, strict=True)]
    return replace(encoded, ids=[], lengths=[], digests=[]), shape


def encode_chunks(chunks: Iterable[Chunk], encoder: Encoder, workers: int, dtype: np.dtype) -> Generator[EncodedChunk]:
    """Encode in order, with one process (this one) or several; at most SLOTS_PER_WORKER chunks per worker are in memory.
    Close the generator to stop early. UserError when a worker dies."""
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    with ExitStack() as stack:
        slots = Slots([os.memfd_create("slot") for _ in range(workers * SLOTS_PER_WORKER)])
        for descriptor in slots.descriptors:
            stack.callback(os.close, descriptor)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (slots, *encoder.settings))
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
                    yield _received(slots, *pending[0], encoder.settings[-1], dtype)
                    free.append(pending.popleft()[0])
            while pending:
                yield _received(slots, *pending[0], encoder.settings[-1], dtype)
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

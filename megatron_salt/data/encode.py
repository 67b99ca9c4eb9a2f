"""Batches of JSON lines to batches of ids, in this process or in several.

What a batch becomes is a pure function of its lines, the tokenizer, the keys and append_eod, and batches come back in
the order in which they went in: the result does not depend on the number of workers. Workers parse and encode; only
raw lines go to them and only arrays of ids come back.
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
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import numpy as np

from megatron_salt.data.documents import BadLine, LineBatch, json_texts
from megatron_salt.data.indexed import token_dtype
from megatron_salt.data.tokenizer import Tokenizer, tokenizer_from_files
from megatron_salt.errors import UserError

BATCHES_PER_WORKER = 3  # read ahead of the consumer, so that memory is bounded


@dataclass(frozen=True)
class EncodedBatch:
    """What the lines of one batch became."""

    file: str
    lines: int
    """Lines that are not blank."""
    bad: list[tuple[int, str]]
    """(line number, reason) of each line that was left out."""
    text_bytes: int
    """Size of the lines."""
    ids: list[np.ndarray]
    """Per key: ids of all documents end to end."""
    lengths: list[np.ndarray]
    """Per key: int32 [documents], each at least 1."""
    empty: list[int]
    """Per key: documents without a token."""


@dataclass(frozen=True)
class Encoder:
    """LineBatch -> EncodedBatch: a pure function of the tokenizer and these settings."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool

    def encode(self, batch: LineBatch) -> EncodedBatch:
        texts: list[list[str]] = [[] for _ in self.keys]
        bad: list[tuple[int, str]] = []
        num_lines = 0
        for number, line in enumerate(batch.lines, start=batch.first_line):
            if not line.strip():
                continue
            num_lines += 1
            try:
                found = json_texts(line, self.keys)
            except BadLine as reason:
                bad.append((number, str(reason)))
                continue
            for column, text in zip(texts, found, strict=True):
                column.append(text)
        columns = [self._encode_column(column) for column in texts]
        return EncodedBatch(batch.file, num_lines, bad, sum(map(len, batch.lines)), [ids for ids, _ in columns],
                            [lengths for _, lengths in columns],
                            [len(column) - len(lengths) for column, (_, lengths) in zip(texts, columns, strict=True)])

    def _encode_column(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = [ids for ids in self.tokenizer.encode_batch(texts) if ids]
        if self.append_eod:
            eod = self.tokenizer.eod
            assert eod is not None
            for ids in documents:
                ids.append(eod)
        lengths = np.fromiter(map(len, documents), np.int32, len(documents))
        flat = itertools.chain.from_iterable(documents)
        return np.fromiter(flat, token_dtype(self.tokenizer.vocab_size), lengths.sum(dtype=np.int64)), lengths


_encoder: Encoder  # of a worker process, set once by _start_worker: a tokenizer is too large to travel with each batch


def _start_worker(kind: str, files: Mapping[str, bytes], keys: tuple[str, ...], append_eod: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer_from_files(kind, files, origin="the tokenizer"), keys, append_eod)


def _die_with_parent() -> None:
    """Workers wait on a pipe whose other end they hold too: without this they outlive a killed parent."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: LineBatch) -> EncodedBatch:
    return _encoder.encode(batch)


def encode_batches(batches: Iterable[LineBatch], encoder: Encoder, workers: int) -> Generator[EncodedBatch]:
    """Encode in order, with one process (this one) or several; at most a few batches per worker are in memory.
    Close the generator to stop early. UserError when a worker dies."""
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    initial = (encoder.tokenizer.kind, encoder.tokenizer.files, encoder.keys, encoder.append_eod)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=initial)
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= workers * BATCHES_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"a worker died, most likely for lack of memory; --workers {workers} may be too many") from None
    finally:
        pool.shutdown(cancel_futures=True)

"""Writes a dataset again without repetitions, in a random order, or both. Memory is bounded, whatever the number of documents.

Repetitions are found exactly among hashes of 128 bits, one range of hashes at a time. The order is a keyed permutation of the documents
that are kept: document i goes to position permute(i, kept, seed). Documents pass through a scratch file in regions of consecutive
positions. A region is small enough to be put in order in memory. A bitmap takes an eighth of a byte a document more. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_salt.data.bitmap import bits_between, new_bitmap, set_bits
from megatron_salt.data.order import permute
from megatron_salt.preprocess.indexed_writer import DIGEST_BYTES, IndexedWriter, Written

_CHUNK = 1 << 20  # documents whose hashes are in memory at a time
_SLICE = 1 << 20  # tokens that are put in order at a time


def finish_arranged(source: IndexedWriter, prefix: str, dedup: bool, seed: int | None, budget: int) -> Written:
    """Close `source`, and write its documents to a finished dataset at `prefix`.

    dedup: leave out repetitions. seed: of the random order; None: keep the order. budget: bytes of memory.
    """
    source.close()
    target = IndexedWriter(prefix, source.dtype)
    try:
        left_out = repeated(Path(source.prefix + ".digests"), source.documents, budget) if dedup else None
        arrange(source, target, Path(source.prefix + ".buckets"), left_out, seed, budget)
        return target.finish()
    finally:
        target.close()


def repeated(digests: Path, documents: int, budget: int) -> np.ndarray:
    """Bitmap of the documents whose hash an earlier document has: uint8 [ceil(documents / 8)].

    digests: a file of uint64 [documents, 2]. budget: bytes of memory.
    """
    passes = -(-documents * 64 // budget) or 1  # 64 bytes: a hash, a document number, and as much again for sorting
    repetitions = new_bitmap(documents)
    for number in range(passes):
        low, high = (np.uint64(min((1 << 64) * end // passes, (1 << 64) - 1)) for end in (number, number + 1))
        hashes, numbers = [], []
        for first, chunk in _digests(digests, documents):
            inside = (chunk[:, 0] >= low) & ((chunk[:, 0] < high) | (number == passes - 1))
            hashes.append(chunk[inside])
            numbers.append(np.flatnonzero(inside) + first)
        if not hashes:
            continue
        pairs, documents_of = np.concatenate(hashes), np.concatenate(numbers)
        order = np.lexsort((documents_of, pairs[:, 1], pairs[:, 0]))
        same = (pairs[order][1:] == pairs[order][:-1]).all(axis=1)
        again = documents_of[order[1:][same]]
        set_bits(repetitions, again)
    return repetitions


def _digests(path: Path, documents: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first document, hashes uint64 [n, 2]), _CHUNK documents at a time."""
    with open(path, "rb") as stream:
        for first in range(0, documents, _CHUNK):
            count = min(_CHUNK, documents - first)
            yield first, np.frombuffer(stream.read(count * DIGEST_BYTES), "<u8").reshape(count, 2)


def arrange(
    source: IndexedWriter, target: IndexedWriter, scratch: Path, left_out: np.ndarray | None, seed: int | None, budget: int
) -> None:
    """Append the documents of `source`, whose files are on disk, to `target`.

    left_out: bitmap of documents to skip. seed: of the random order; None: keep the order. scratch: path of a file that takes
    as many bytes again. budget: bytes of memory; a very long document may take more.
    """
    if seed is None:
        for ids, lengths, _ in _kept(source, left_out, budget // 8):
            target.append(ids, lengths)
        return
    kept = source.documents if left_out is None else source.documents - int(np.bitwise_count(left_out).sum(dtype=np.int64))
    regions = _Regions.within(source, left_out, kept, seed, budget)
    try:
        with open(scratch, "w+b", buffering=0) as stream:
            for ids, lengths, numbers in _kept(source, left_out, budget // 16):
                regions.write(stream.fileno(), ids, lengths, permute(numbers, kept, seed))
            for ids, lengths in regions.read(stream.fileno()):
                target.append(ids, lengths)
    finally:
        scratch.unlink(missing_ok=True)


class _Regions:
    """The scratch file. A region holds the documents of `width` consecutive positions: positions int64, lengths int32, then ids."""

    def __init__(self, dtype: np.dtype, width: int, documents: np.ndarray, tokens: np.ndarray) -> None:
        """documents, tokens: numbers for each region, int64 [regions]."""
        self.dtype, self.width, self.documents, self.tokens = dtype, width, documents, tokens
        sizes = 12 * documents + dtype.itemsize * tokens
        self.starts = np.cumsum(sizes) - sizes
        self.documents_done, self.tokens_done = np.zeros_like(documents), np.zeros_like(tokens)

    @classmethod
    def within(cls, source: IndexedWriter, left_out: np.ndarray | None, kept: int, seed: int, budget: int) -> _Regions:
        """Regions so small that one can be put in order with `budget` bytes of memory."""
        wanted = -(-(source.tokens * source.dtype.itemsize * 4 + kept * 64) // budget) or 1
        width = -(-kept // wanted) or 1
        documents = np.minimum(width, kept - np.arange(0, kept, width))
        tokens = np.zeros_like(documents)
        for _, lengths, numbers in _numbered(source, left_out):
            np.add.at(tokens, permute(numbers, kept, seed) // width, lengths)
        return cls(source.dtype, width, documents, tokens)

    def write(self, descriptor: int, ids: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> None:
        """Write documents into the regions of their positions. ids: end to end."""
        if len(lengths) == 0:
            return
        regions = positions // self.width
        order = np.argsort(regions, kind="stable")
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        ids, lengths, positions, regions = (
            _gathered(ids, starts[order], lengths[order]),
            lengths[order],
            positions[order],
            regions[order],
        )
        present, firsts = np.unique(regions, return_index=True)
        ends = np.cumsum(lengths, dtype=np.int64)
        for region, first, last in zip(present.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(regions)], strict=True):
            begin, end = int(ends[first] - lengths[first]), int(ends[last - 1])
            base, number = int(self.starts[region]), int(self.documents[region])
            documents, tokens = int(self.documents_done[region]), int(self.tokens_done[region])
            _write(descriptor, positions[first:last], base + 8 * documents)
            _write(descriptor, lengths[first:last], base + 8 * number + 4 * documents)
            _write(descriptor, ids[begin:end], base + 12 * number + self.dtype.itemsize * tokens)
            self.documents_done[region] += last - first
            self.tokens_done[region] += end - begin

    def read(self, descriptor: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids end to end, int32 lengths) of all documents in the order of their positions, about _SLICE tokens at a time."""
        assert (self.documents_done == self.documents).all() and (self.tokens_done == self.tokens).all()
        for base, number, tokens in zip(self.starts.tolist(), self.documents.tolist(), self.tokens.tolist(), strict=True):
            positions = _read(descriptor, base, 8 * number).view(np.int64)
            lengths = _read(descriptor, base + 8 * number, 4 * number).view(np.int32)
            ids = _read(descriptor, base + 12 * number, self.dtype.itemsize * tokens).view(self.dtype)
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            order = np.argsort(positions)
            cuts = np.flatnonzero(np.diff(np.cumsum(lengths[order], dtype=np.int64) // _SLICE)) + 1
            for some in np.split(order, cuts):
                if len(some):
                    yield _gathered(ids, starts[some], lengths[some]), lengths[some]


def _gathered(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ids of the documents that begin at `starts`, put end to end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    indices = np.repeat(starts - (ends - lengths), lengths)
    indices += np.arange(len(indices))
    return ids[indices]


def _numbered(source: IndexedWriter, left_out: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(whether each document is kept, lengths of the kept ones, their numbers among all kept ones), chunk after chunk."""
    first = number = 0
    for lengths in source.stored_lengths():
        keep = np.ones(len(lengths), bool)
        if left_out is not None:
            keep = ~bits_between(left_out, first, first + len(lengths))
        count = int(np.count_nonzero(keep))
        yield keep, lengths[keep], np.arange(number, number + count)
        first, number = first + len(lengths), number + count


def _kept(source: IndexedWriter, left_out: np.ndarray | None, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids end to end, int32 lengths, numbers among all kept ones) of the kept documents, about `size` bytes at a time."""
    with open(source.prefix + ".bin", "rb") as stream:
        for (keep, _, numbers), lengths in zip(_numbered(source, left_out), source.stored_lengths(), strict=True):
            ends, done = np.cumsum(lengths, dtype=np.int64), 0
            cuts = np.flatnonzero(np.diff(ends * source.dtype.itemsize // max(size, 1))) + 1
            for some in np.split(np.arange(len(lengths)), cuts):
                ids = np.fromfile(stream, source.dtype, int(lengths[some].sum(dtype=np.int64)))
                count = int(np.count_nonzero(keep[some]))
                yield ids[np.repeat(keep[some], lengths[some])], lengths[some][keep[some]], numbers[done : done + count]
                done += count


def _write(descriptor: int, values: np.ndarray, offset: int) -> None:
    """Write all of an array at `offset`."""
    data, done = np.ascontiguousarray(values).data.cast("B"), 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _read(descriptor: int, offset: int, size: int) -> np.ndarray:
    """`size` bytes from `offset` on: uint8 [size]."""
    data, done = np.empty(size, np.uint8), 0
    while done < size:  # one call reads at most 2 GiB
        more = os.preadv(descriptor, [data[done:].data], offset + done)
        assert more, (offset, size)
        done += more
    return data

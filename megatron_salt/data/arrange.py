"""A finished stage of documents written again without repetitions, in a random order, or both; memory bounded, whatever their number.

Repetitions are found exactly among hashes of 128 bits, range by range of the first half. The order is a keyed permutation of the
documents that are kept: number i goes to position permute(i, how many, seed), a pure function. Documents go through a scratch file
in regions of consecutive positions, each small enough to be put in order in memory; a bitmap of an eighth of a byte a document comes
on top. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_salt.data.indexed import DIGEST_BYTES, IndexedWriter, Written
from megatron_salt.data.order import permute

_CHUNK = 1 << 20  # documents whose numbers are in memory at a time


def finish_arranged(source: IndexedWriter, prefix: str, dedup: bool, seed: int | None, budget: int) -> Written:
    """Write the documents of `source`, which is closed by this, to a finished dataset at `prefix`. dedup: leave out repetitions.
    seed: of the order; None: as they are. budget: bytes of memory."""
    source.close()
    target = IndexedWriter(prefix, source.dtype)
    try:
        left_out = repeated(Path(source.prefix + ".digests"), source.documents, budget) if dedup else None
        arrange(source, target, Path(source.prefix + ".buckets"), left_out, seed, budget)
        return target.finish()
    finally:
        target.close()


def repeated(digests: Path, documents: int, budget: int) -> np.ndarray:
    """Which documents are like an earlier one: uint8 [documents / 8], bits as np.packbits makes them, little.
    digests: a file of uint64 [documents, 2]. budget: bytes of memory."""
    passes = -(-documents * 64 // budget) or 1  # a hash, its number, and as much for sorting
    found = np.zeros(-(-documents // 8), np.uint8)
    for turn in range(passes):
        low, high = (np.uint64(min((1 << 64) * end // passes, (1 << 64) - 1)) for end in (turn, turn + 1))
        hashes, numbers = [], []
        for first, chunk in _digests(digests, documents):
            inside = (chunk[:, 0] >= low) & ((chunk[:, 0] < high) | (turn == passes - 1))
            hashes.append(chunk[inside])
            numbers.append(np.flatnonzero(inside) + first)
        if not hashes:
            continue
        pairs, places = np.concatenate(hashes), np.concatenate(numbers)
        order = np.lexsort((places, pairs[:, 1], pairs[:, 0]))
        same = (pairs[order][1:] == pairs[order][:-1]).all(axis=1)
        again = places[order[1:][same]]
        np.bitwise_or.at(found, again >> 3, (1 << (again & 7)).astype(np.uint8))
    return found


def _digests(path: Path, documents: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first document, uint64 [some, 2])"""
    with open(path, "rb") as stream:
        for first in range(0, documents, _CHUNK):
            count = min(_CHUNK, documents - first)
            yield first, np.frombuffer(stream.read(count * DIGEST_BYTES), "<u8").reshape(count, 2)


def arrange(source: IndexedWriter, target: IndexedWriter, scratch: Path, left_out: np.ndarray | None, seed: int | None,
            budget: int) -> None:
    """Append the documents of `source`, whose files are on disk, to `target`: without those in the bitmap `left_out`, and in the
    order of `seed` unless that is None. scratch: a path for as many bytes again. budget: bytes of memory, long documents apart."""
    if seed is None:
        for ids, lengths, _ in _kept(source, left_out, budget // 4):
            target.append(ids, lengths)
        return
    kept = source.documents if left_out is None else source.documents - int(np.bitwise_count(left_out).sum(dtype=np.int64))
    item = source.dtype.itemsize
    regions = max(-(-source.tokens * item * 4 // budget), 1)
    width = max(-(-kept // regions), 1)  # positions of a region
    sizes = np.zeros(-(-kept // width) + 1, np.int64)
    for _, lengths, numbers in _numbered(source, left_out):
        np.add.at(sizes, permute(numbers, kept, seed) // width + 1, lengths.astype(np.int64) * item + 12)
    starts = np.cumsum(sizes)
    try:
        with open(scratch, "w+b", buffering=0) as stream:
            _scatter(source, left_out, stream.fileno(), starts[:-1].copy(), width, kept, seed, budget)
            for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                _append_region(target, _read(stream.fileno(), start, end - start))
    finally:
        scratch.unlink(missing_ok=True)


def _scatter(source: IndexedWriter, left_out: np.ndarray | None, descriptor: int, cursors: np.ndarray, width: int, kept: int, seed: int,
             budget: int) -> None:
    """Write each document, with its position (int64) and length (int32) before it, to the region it belongs to."""
    for ids, lengths, numbers in _kept(source, left_out, budget // 4):
        positions = permute(numbers, kept, seed)
        ends = np.cumsum(lengths, dtype=np.int64)
        homes = positions // width
        order = np.argsort(homes, kind="stable")
        cuts = np.flatnonzero(np.diff(homes[order])) + 1
        for group in np.split(order, cuts):
            if len(group) == 0:
                continue
            parts = []
            for i in group.tolist():
                parts += [positions[i].tobytes(), lengths[i].tobytes(), ids[ends[i] - lengths[i]:ends[i]].tobytes()]
            data = b"".join(parts)
            home = homes[group[0]]
            _write(descriptor, data, int(cursors[home]))
            cursors[home] += len(data)


def _append_region(target: IndexedWriter, data: bytes) -> None:
    """The documents of a region, in the order of their positions."""
    found, at, item = [], 0, target.dtype.itemsize
    while at < len(data):
        position, length = int.from_bytes(data[at:at + 8], "little"), int.from_bytes(data[at + 8:at + 12], "little")
        found.append((position, at + 12, length))
        at += 12 + length * item
    found.sort()
    ids = b"".join(data[begin:begin + length * item] for _, begin, length in found)
    target.append(np.frombuffer(ids, target.dtype), np.array([length for _, _, length in found], np.int32))


def _numbered(source: IndexedWriter, left_out: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(which documents are kept, the kept ones' lengths, and their numbers among all that are kept), chunk after chunk."""
    first = number = 0
    for lengths in source.stored_lengths():
        keep = np.ones(len(lengths), bool)
        if left_out is not None:
            bits = np.arange(first, first + len(lengths))
            keep = (left_out[bits >> 3] >> (bits & 7).astype(np.uint8)) & 1 == 0
        count = int(np.count_nonzero(keep))
        yield keep, lengths[keep], np.arange(number, number + count)
        first, number = first + len(lengths), number + count


def _kept(source: IndexedWriter, left_out: np.ndarray | None, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids end to end, int32 lengths, numbers among all that are kept) of the documents that are kept, about `size` bytes at a time."""
    with open(source.prefix + ".bin", "rb") as stream:
        for (keep, _, numbers), lengths in zip(_numbered(source, left_out), source.stored_lengths(), strict=True):
            ends, done = np.cumsum(lengths, dtype=np.int64), 0
            cuts = np.flatnonzero(np.diff(ends * source.dtype.itemsize // max(size, 1))) + 1
            for some in np.split(np.arange(len(lengths)), cuts):
                ids = np.fromfile(stream, source.dtype, int(lengths[some].sum(dtype=np.int64)))
                count = int(np.count_nonzero(keep[some]))
                yield ids[np.repeat(keep[some], lengths[some])], lengths[some][keep[some]], numbers[done:done + count]
                done += count


def _write(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one call reads at most 2 GiB
        more = os.pread(descriptor, size - len(data), offset + len(data))
        assert more, (offset, size)
        data += more
    return data

"""Which samples of a score index may be chosen: scored, not held out, with a token that counts, and no repetition of an earlier one.

The answer is a bitmap, N/8 bytes in memory (125 MB at 10^9 samples). It takes one pass over the column `tokens`; the search for
repetitions takes a few passes over the column `content`. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_salt.data.bitmap import bits_at, bits_between, new_bitmap, set_bits
from megatron_salt.data.windows import first_ids, num_held_out
from megatron_salt.selection.score_format import IndexManifest
from megatron_salt.selection.score_reader import CHUNK, ScoreIndex

_HASHES = 1 << 64


@dataclass(frozen=True, kw_only=True)
class Eligible:
    """The samples that may be chosen, and how many may not, by reason. A sample with several reasons counts once: held out, then
    unscored, then empty, then duplicate."""

    packed: np.ndarray
    """uint8 [ceil(N / 8)]: a bitmap of the samples that may be chosen."""
    held_out: int
    """Samples that --valid-share holds out from training."""
    empty: int
    """Samples without a token that counts."""
    duplicates: int
    """Samples whose tokens are those of a sample with a lower id."""
    unscored: int = 0
    """Samples that were not scored."""

    def of(self, first: int, end: int) -> np.ndarray:
        """Which of samples [first, end) may be chosen: bool [end - first]."""
        return bits_between(self.packed, first, end)

    def have(self, ids: np.ndarray) -> np.ndarray:
        """Which of these samples may be chosen: int64 [n], in any order -> bool [n]."""
        return bits_at(self.packed, ids)

    def count(self, first: int, end: int) -> int:
        """How many of samples [first, end) may be chosen."""
        return sum(int(np.count_nonzero(self.of(start, min(start + CHUNK, end)))) for start in range(first, end, CHUNK))


def find_eligible(index: ScoreIndex, valid_share: float, repeated: np.ndarray | None) -> Eligible:
    """The samples of an index that may be chosen. repeated: the bitmap that `duplicates` returns; None: duplicates may be chosen.
    UserError where --valid-share leaves nothing of a dataset."""
    held_out = held_out_ranges(index.manifest, valid_share)
    packed = new_bitmap(index.num_samples)
    empty = num_repeated = unscored = 0
    for first, tokens in index.chunks("tokens", size=CHUNK):  # CHUNK is a multiple of 8
        end = first + len(tokens)
        may = np.ones(len(tokens), bool)
        for start, stop in held_out:
            may[max(start - first, 0) : max(stop - first, 0)] = False
        if index.manifest.sample is not None:
            scored = index.manifest.scored(first, end)
            unscored += int(np.count_nonzero(may & ~scored))
            may &= scored
        counts = tokens > 0
        empty += int(np.count_nonzero(may & ~counts))
        may &= counts
        if repeated is not None:
            again = bits_between(repeated, first, end)
            num_repeated += int(np.count_nonzero(may & again))
            may &= ~again
        packed[first // 8 : -(-end // 8)] = np.packbits(may, bitorder="little")
    return Eligible(
        packed=packed,
        held_out=sum(stop - start for start, stop in held_out),
        empty=empty,
        duplicates=num_repeated,
        unscored=unscored,
    )


def dataset_ranges(manifest: IndexManifest) -> list[tuple[int, int]]:
    """(first id, end) of the samples of each dataset."""
    return list(itertools.pairwise(first_ids(dataset.samples for dataset in manifest.datasets).tolist()))


def held_out_ranges(manifest: IndexManifest, valid_share: float) -> list[tuple[int, int]]:
    """(first id, end) of the windows that a run with this --valid-share holds out, for each dataset that has some. UserError as in
    `num_held_out`."""
    held_out = [
        num_held_out(dataset.samples, valid_share, dataset.prefix, manifest.seq_length) for dataset in manifest.datasets
    ]
    return [(end - count, end) for (_, end), count in zip(dataset_ranges(manifest), held_out, strict=True) if count]


# --- duplicates -------------------------------------------------------------------------------------------------------


def duplicates(index: ScoreIndex, max_bytes: int) -> np.ndarray:
    """Bitmap of the samples whose content hash equals that of a sample with a lower id: uint8 [ceil(N / 8)].

    Memory: the bitmap and `max_bytes`. The hashes are split into ranges of values that fit into `max_bytes`. Each range takes two passes
    over the column: one collects the hashes of the range, one marks the samples whose hash came before. All equal windows are found.
    Different windows are called equal where two 64-bit hashes collide: N^2 / 2^65 times on average, that is 3e-6 times among 10^7 samples
    and 0.03 times among 10^9.
    """
    packed = new_bitmap(index.num_samples)
    capacity = max(
        min(max_bytes // 9, 2 * index.num_samples), 16
    )  # 8 bytes a hash, and one bit more than half a byte to mark it
    collected = np.empty(capacity, np.uint64)
    parts = -(-index.num_samples * 5 // (4 * capacity))
    ranges = [(_HASHES * part // parts, _HASHES * (part + 1) // parts) for part in reversed(range(parts))]
    while ranges:
        low, end = ranges.pop()
        repeated = _repeated_hashes(index, low, end, collected)
        if repeated is None:
            assert end - low > 1, (low, capacity)
            ranges += [((low + end) // 2, end), (low, (low + end) // 2)]
        elif repeated.size:
            _mark(index, low, end, repeated, packed)
    return packed


def _hashes_in(index: ScoreIndex, low: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, hashes) of the samples whose hash is in [low, end), ids ascending, a chunk at a time: int64 [n], uint64 [n]."""
    for first, hashes in index.chunks("content", size=CHUNK):
        inside = (hashes >= np.uint64(low)) & (hashes <= np.uint64(end - 1))
        yield first + np.flatnonzero(inside), hashes[inside]


def _repeated_hashes(index: ScoreIndex, low: int, end: int, collected: np.ndarray) -> np.ndarray | None:
    """Hashes in [low, end) that occur more than once, ascending: a view of the front of `collected`. None where `collected` is too
    small."""
    count = 0
    for _, hashes in _hashes_in(index, low, end):
        rest = hashes
        while rest.size:
            if count == len(collected):
                count = _sort_and_keep_two(collected, count)
                if count > len(collected) // 2:
                    return None
            taken = rest[: len(collected) - count]
            collected[count : count + len(taken)] = taken
            count, rest = count + len(taken), rest[len(taken) :]
    count = _sort_and_keep_two(collected, count)
    return collected[: _keep(collected, count, lambda run: run[2:] == run[1:-1])]


def _sort_and_keep_two(values: np.ndarray, count: int) -> int:
    """Sort values[:count] in place and keep at most two of each value, at the front. Returns how many are left."""
    values[:count].sort()
    return _keep(values, count, lambda run: (run[2:] != run[1:-1]) | (run[1:-1] != run[:-2]))


def _keep(values: np.ndarray, count: int, wanted: Callable[[np.ndarray], np.ndarray]) -> int:
    """Move the values of values[:count] that are `wanted` to the front. Returns how many they are.

    wanted(run) -> bool [n]: whether each of the last n values of a run of n + 2 is wanted; the two before each are there to compare
    with. Two values that differ from the first one stand before it.
    """
    kept, before = 0, ~values[:1].repeat(2)
    for start in range(0, count, CHUNK):
        run = np.concatenate([before, values[start : min(start + CHUNK, count)]])
        before, chosen = run[-2:], run[2:][wanted(run)]
        values[kept : kept + len(chosen)] = chosen
        kept += len(chosen)
    return kept


def _mark(index: ScoreIndex, low: int, end: int, repeated: np.ndarray, packed: np.ndarray) -> None:
    """For each hash in `repeated` (ascending, in [low, end)) set the bits of all samples that have it, except the first one."""
    seen = np.zeros(len(repeated), bool)
    for ids, hashes in _hashes_in(index, low, end):
        place = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
        matches = repeated[place] == hashes
        ids, place = ids[matches], place[matches]
        distinct, at = np.unique(place, return_index=True)  # the first of each in this chunk
        again = np.ones(len(ids), bool)
        again[at] = seen[distinct]
        seen[distinct] = True
        set_bits(packed, ids[again])

"""Which samples of equal score are taken: those that come first in a pseudo-random order of all ids, keyed by a seed.

Each sample has a tie rank, a pseudo-random number of 64 bits. Where a rule takes n samples of a group of equal scores, it takes those
whose rank is below a limit, and the limit is such that exactly n ranks are below it. One pass over the column finds the limit. Ranks are
spread evenly, so only ranks near the expected limit are kept and sorted: memory grows with the square root of the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_salt.data.order import key_of, keyed_ranks
from megatron_salt.selection.eligibility import Eligible
from megatron_salt.selection.score_reader import ScoreIndex

TIE_SEED = 1234
_RANKS = 1 << 64
_PIECE = 1 << 14  # samples whose ranks stay in cache
_DEVIATIONS = 8.0  # half the width of a bracket, in standard deviations of the limit


@dataclass(frozen=True)
class Ties:
    """A group of eligible samples of equal score, of which a part is taken."""

    score: float
    taken: int
    """0 < taken < size."""
    size: int


def tie_ranks(ids: np.ndarray, seed: int) -> np.ndarray:
    """Tie ranks of samples; the least is taken first. int64 [n] -> uint64 [n], all different."""
    return keyed_ranks(ids, key_of(f"ties/{seed}"))


def tie_limits(
    index: ScoreIndex, column: str, eligible: Eligible, bounds: tuple[int, int], groups: Sequence[Ties], seed: int, size: int,
    deviations: float = _DEVIATIONS,
) -> list[int]:  # fmt: skip
    """For each group the limit below which exactly `taken` of its tie ranks lie. The groups are of samples [bounds[0], bounds[1]).

    size: samples that are read together. deviations: width of the first bracket; a limit outside it costs another pass.
    """
    brackets = [_bracket(group, deviations) for group in groups]
    below = [0] * len(groups)
    inside: list[list[np.ndarray]] = [[] for _ in groups]
    for first, scores in index.chunks(column, *bounds, size):
        for number, (group, (low, high)) in enumerate(zip(groups, brackets, strict=True)):
            equal = scores == np.float32(group.score)
            if not equal.any():
                continue
            equal &= eligible.of(first, first + len(scores))
            for _, members, ranks in _ranks_of(first, equal, seed):
                below[number] += int(np.count_nonzero((ranks < np.uint64(low)) & members))
                inside[number].append(ranks[(ranks - np.uint64(low) <= np.uint64(high - low)) & members])
    limits = []
    for number, group in enumerate(groups):
        near, place = np.concatenate(inside[number]), group.taken - below[number]
        if 0 <= place < len(near):
            limits.append(int(np.partition(near, place)[place]))
        else:
            limits += tie_limits(index, column, eligible, bounds, [group], seed, size, 4 * deviations)
    return limits


def below_limit(first: int, equal: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Which samples of a group have a tie rank below `limit`. equal: bool [n], the group's samples among first, first + 1, ...
    -> bool [n]."""
    taken = np.zeros(len(equal), bool)
    for place, members, ranks in _ranks_of(first, equal, seed):
        taken[place] = (ranks < np.uint64(limit)) & members
    return taken


def _ranks_of(first: int, equal: np.ndarray, seed: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(slice of `equal`, which of its samples are of the group, their ranks) of every piece that has such samples.

    Ranks of all samples of a piece are computed, whether they are of the group or not: pieces stay in cache, and nothing is gathered."""
    for start in range(0, len(equal), _PIECE):
        members = equal[start : start + _PIECE]
        if members.any():
            ids = np.arange(first + start, first + start + len(members))
            yield slice(start, start + len(members)), members, tie_ranks(ids, seed)


def _bracket(group: Ties, deviations: float) -> tuple[int, int]:
    """The least and the greatest rank that the limit may have, almost surely."""
    middle, half = group.taken / group.size, deviations * (math.sqrt(group.size) + 1) / group.size
    return max(0, int((middle - half) * _RANKS)), min(_RANKS - 1, int((middle + half) * _RANKS))

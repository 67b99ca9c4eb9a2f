"""The samples of a pool: from a number below its size to a global sample id.

`IdRanges` are ranges of consecutive ids, such as all windows that are not held out. `Selected` is a selection. `Unseen` is the rest after
stage 1 drew from a selection. `order.py` orders a pool, `blend.py` says which pool has its turn. Pure. Memory is O(1) or a mapped file;
an id costs at most O(log size).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_salt.data.order import Pool


class Members(Protocol):
    """The samples of a pool, numbered from 0 in a fixed way."""

    @property
    def size(self) -> int:
        """Number of samples."""

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """Global ids of samples: numbers int64 [n] in [0, size) -> int64 [n]."""


@dataclass(frozen=True)
class IdRanges:
    """Ranges of consecutive ids, ascending."""

    firsts: tuple[int, ...]
    """First id of each range."""
    lengths: tuple[int, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number of members up to the end of each range: int64 [ranges]."""
        return np.cumsum(self.lengths, dtype=np.int64)

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        index = np.searchsorted(self._ends, numbers, side="right")
        return numbers + (np.array(self.firsts, np.int64) - (self._ends - self.lengths))[index]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `ids`, for ids that are members."""
        index = np.searchsorted(np.array(self.firsts, np.int64), ids, side="right") - 1
        return ids - (np.array(self.firsts, np.int64) - (self._ends - self.lengths))[index]


@dataclass(frozen=True)
class Selected:
    """The ids of a selection."""

    sample_ids: np.ndarray
    """Ascending integers [size]; may be a mapped file."""

    @property
    def size(self) -> int:
        return len(self.sample_ids)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        return self.sample_ids[numbers].astype(np.int64)

    def numbers(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number int64 [n], whether it is a member bool [n]) of any ids, int64 [n]."""
        insertion = bisect(self.size, len(ids), lambda numbers, rows: self.ids(numbers) >= ids[rows])
        inside = np.minimum(insertion, self.size - 1)
        return inside, self.ids(inside) == ids


@dataclass(frozen=True)
class Unseen:
    """All of `everything` except the first `drawn` of the `chosen` samples in the order of `pool`.

    The samples that were not chosen come first, then the chosen samples that were not drawn.
    """

    everything: IdRanges
    chosen: Selected
    pool: Pool
    """The order in which chosen samples were visited."""
    drawn: int
    """Number of visits, repeats included."""

    @property
    def size(self) -> int:
        return self.everything.size - min(self.drawn, self.chosen.size)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        never = self.everything.size - self.chosen.size
        ids = np.empty(len(numbers), np.int64)
        first = numbers < never
        ids[first] = self._never_chosen(numbers[first])
        ids[~first] = self.chosen.ids(self.pool.ids(self.drawn + numbers[~first] - never))
        return ids

    def saw(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id, a member of `everything`, was visited: int64 [n] -> bool [n]."""
        if not self.drawn:
            return np.zeros(len(ids), bool)
        numbers, chosen = self.chosen.numbers(ids)
        if self.drawn < self.chosen.size:
            chosen[chosen] = self.pool.positions(numbers[chosen]) < self.drawn
        return chosen

    def _never_chosen(self, numbers: np.ndarray) -> np.ndarray:
        """Ids of samples that were not chosen. Before the i-th chosen sample, at position p of `everything`, there are p - i of them."""

        def enough(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return self.everything.numbers(self.chosen.ids(chosen)) - chosen > numbers[rows]

        return self.everything.ids(numbers + bisect(self.chosen.size, len(numbers), enough))


def bisect(size: int, count: int, holds: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Smallest number in [0, size] from which on `holds` is true, for each of `count` rows: int64 [count].

    holds(numbers, rows) -> bool [n]: whether it is true for each pair of a number in [0, size) and a row in [0, count), int64 [n].
    """
    low, high = np.zeros(count, np.int64), np.full(count, size, np.int64)
    rows = np.flatnonzero(low < high)
    while rows.size:
        middle = (low[rows] + high[rows]) // 2
        true = holds(middle, rows)
        high[rows[true]] = middle[true]
        low[rows[~true]] = middle[~true] + 1
        rows = rows[low[rows] < high[rows]]
    return low

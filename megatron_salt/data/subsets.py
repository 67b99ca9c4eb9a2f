"""Which samples a pool has: from a number below its size to a global sample id.

`IdRanges` are whole stretches of consecutive ids, such as all windows that no one holds out; `Selected` is a selection; `Unseen` is what a
stage that drew from a selection has left. A pool's order is another matter (`order.py`), and so is whose turn it is (`blend.py`).
Pure, memory of O(1) or of a mapped file, and O(log size) an id at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_salt.data.order import Pool


class Members(Protocol):
    """The samples of a pool, in one fixed numbering."""

    @property
    def size(self) -> int:
        """How many there are."""

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """Global ids of these: int64 [n] in [0, size) -> int64 [n]."""


@dataclass(frozen=True)
class IdRanges:
    """Stretches of consecutive ids, ascending."""

    firsts: tuple[int, ...]
    """First id of each."""
    lengths: tuple[int, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64 [runs]: members up to the end of each run."""
        return np.cumsum(self.lengths, dtype=np.int64)

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        run = np.searchsorted(self._ends, numbers, side="right")
        return numbers + (np.array(self.firsts, np.int64) - (self._ends - self.lengths))[run]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `ids`, for ids that are members."""
        run = np.searchsorted(np.array(self.firsts, np.int64), ids, side="right") - 1
        return ids - (np.array(self.firsts, np.int64) - (self._ends - self.lengths))[run]


@dataclass(frozen=True)
class Selected:
    """Ids that a selection lists."""

    sample_ids: np.ndarray
    """Ascending integers [size], perhaps in a mapped file."""

    @property
    def size(self) -> int:
        return len(self.sample_ids)

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        return self.sample_ids[numbers].astype(np.int64)

    def numbers(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number int64 [n], whether it is a member bool [n]) of any ids."""
        place = bisect(self.size, len(ids), lambda numbers, rows: self.ids(numbers) >= ids[rows])
        inside = np.minimum(place, self.size - 1)
        return inside, self.ids(inside) == ids


@dataclass(frozen=True)
class Unseen:
    """All of `everything` but the first `drawn` samples, in the order of `pool`, of what was `chosen` from it.

    First those that were never chosen, then the chosen ones whose turn did not come.
    """

    everything: IdRanges
    chosen: Selected
    pool: Pool
    """The order in which the chosen were visited."""
    drawn: int
    """How many visits there were, repeats included."""

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
        """Whether each id, a member of `everything`, was among the visits: int64 [n] -> bool [n]."""
        if not self.drawn:
            return np.zeros(len(ids), bool)
        numbers, chosen = self.chosen.numbers(ids)
        if self.drawn < self.chosen.size:
            chosen[chosen] = self.pool.positions(numbers[chosen]) < self.drawn
        return chosen

    def _never_chosen(self, numbers: np.ndarray) -> np.ndarray:
        """Ids of those that were never chosen: before the i-th chosen one, at place p of everything, there are p - i of them."""

        def enough(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return self.everything.numbers(self.chosen.ids(chosen)) - chosen > numbers[rows]

        return self.everything.ids(numbers + bisect(self.chosen.size, len(numbers), enough))


def bisect(size: int, count: int, holds: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """For each of `count` rows the least number in [0, size] from which on `holds` is true: int64 [count].

    holds(numbers, rows) -> bool: whether it is true of each number, in [0, size), for each row, int64 in [0, count).
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

"""The pool, and the sample of that pool, at each position of the endless stream of samples.

Without weights all datasets form one pool: each sample is visited once an epoch. With weights each dataset is a pool with its own
epochs, and the pools take turns evenly. Among the first p samples each pool has its share of p, up to ceil(log2(pools)) / 2 samples;
in every BLOCK of samples it has its exact share. Pure, and O(log pools) a sample. `subsets.py` says which samples a pool has.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from megatron_salt.data.order import Pool, PoolProgress
from megatron_salt.errors import UserError

BLOCK = 1 << 30


class Blend(Protocol):
    """A function from every position to a sample of a pool."""

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools that take turns."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pool, sample of that pool) at each position: int [n] >= 0 -> int64 [n], int64 [n]."""

    def progress(self, position: int) -> list[PoolProgress]:
        """How much of each pool the first `position` samples have drawn."""


def make_blend(name: str, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> Blend:
    """The stream `name`. sizes: number of samples of each pool, at least 1. weights: relative; None: there is one pool."""
    if weights is None:
        (size,) = sizes
        return SinglePool(Pool(name, size, seed))
    pools = tuple(Pool(f"{name}.{number}", size, seed) for number, size in enumerate(sizes))
    return Mixture(pools, shares(weights))


@dataclass(frozen=True)
class SinglePool:
    """One pool that has every turn."""

    pool: Pool

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.pool,)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        samples = self.pool.ids(positions)
        return np.zeros_like(samples), samples

    def progress(self, position: int) -> list[PoolProgress]:
        return [self.pool.progress(position)]


@dataclass(frozen=True)
class Mixture:
    """Pools that take turns by their shares.

    The turns come from a binary tree over the pools. A node that has seen p samples has sent round(p * left share)
    of them to its left child, so the position inside a pool is a closed form, and the positions of a pool appear
    in order without a gap.
    """

    pools: tuple[Pool, ...]
    block_counts: tuple[int, ...]
    """Samples of each pool in a block of BLOCK; all at least 1."""

    @cached_property
    def _depth(self) -> int:
        return math.ceil(math.log2(len(self.pools)))

    @cached_property
    def _totals(self) -> np.ndarray:
        """int64 [2 << depth]: samples of a block below each node; node i has the children 2i and 2i + 1, the root is 1."""
        totals = np.zeros(2 << self._depth, np.int64)
        totals[1 << self._depth :][: len(self.pools)] = self.block_counts
        for node in range((1 << self._depth) - 1, 0, -1):
            totals[node] = totals[2 * node] + totals[2 * node + 1]
        return totals

    def _sent_left(self, seen: np.ndarray, node: np.ndarray) -> np.ndarray:
        """How many of the first `seen` samples of a node belong to its left child."""
        total, left = self._totals[node], self._totals[2 * node]
        blocks, rest = np.divmod(seen, np.maximum(total, 1))
        return blocks * left + (rest * left + total // 2) // np.maximum(total, 1)  # below 2^60: rest, left < 2^30

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = np.array(positions, np.int64)  # position among the samples of the current node
        node = np.ones_like(seen)
        for _ in range(self._depth):
            left = self._sent_left(seen, node)
            goes_right = self._sent_left(seen + 1, node) == left
            seen = np.where(goes_right, seen - left, left)
            node = 2 * node + goes_right
        pool = node - (1 << self._depth)
        sample = np.empty_like(seen)
        for index in np.unique(pool).tolist():
            in_pool = pool == index
            sample[in_pool] = self.pools[index].ids(seen[in_pool])
        return pool, sample

    def progress(self, position: int) -> list[PoolProgress]:
        drawn = np.array([position], np.int64)
        for level in range(self._depth):
            left = self._sent_left(drawn, np.arange(1 << level, 2 << level))
            drawn = np.stack([left, drawn - left], axis=1).reshape(-1)
        return [pool.progress(count) for pool, count in zip(self.pools, drawn.tolist(), strict=False)]


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each pool in a BLOCK: BLOCK * weight / sum of weights, rounded by largest remainder; ties go to the first."""
    total = math.fsum(weights)
    exact = [BLOCK * (weight / total) for weight in weights]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: BLOCK - sum(counts)]:
        counts[index] += 1
    assert min(counts) >= 1 and sum(counts) == BLOCK, (weights, counts)
    return tuple(counts)


VALID = "valid"
"""Name of the held-out data without a name; a named set is VALID/NAME."""

_NAMED = re.compile(r"([A-Za-z0-9_][\w.-]*)=(.*)", re.DOTALL | re.ASCII)


def parse_valid_data_path(values: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """{name of a set: its words, for `parse_data_path`} in the order of the words. UserError naming the flag.

    Without names all words are one set, VALID. NAME=WORD begins the set VALID/NAME, to which the words up to the next name belong.
    """
    flag = "--valid-data-path"
    named = [_NAMED.fullmatch(value) for value in values]
    if not any(named):
        return {VALID: tuple(values)} if values else {}
    if named[0] is None:
        first = next(match[0] for match in named if match)
        raise UserError(
            f"{flag} {values[0]} stands before the first named set, {first}; name every set (write a path that begins with a name and "
            f"an equals sign as ./{first})"
        )
    sets: dict[str, list[str]] = {}
    name = ""
    for value, match in zip(values, named, strict=True):
        if match is not None:
            name = f"{VALID}/{match[1]}"
            if name in sets:
                raise UserError(
                    f"{flag} names the set {match[1]} twice; a set of several datasets is NAME=WEIGHT PREFIX WEIGHT PREFIX"
                )
            sets[name] = []
        word = value if match is None else match[2]
        sets[name] += [word] if word else []
    for name, found in sets.items():
        if not found:
            raise UserError(f"{flag} {name.removeprefix(f'{VALID}/')}= names no data")
    return {name: tuple(found) for name, found in sets.items()}


def parse_data_path(values: Sequence[str], flag: str) -> tuple[list[str], list[float] | None]:
    """`prefix ...` or `weight prefix ...` -> (prefixes without .bin or .idx, weights or None); UserError naming `flag`."""
    if not values:
        raise UserError(f"{flag} is missing: it takes the prefix of a .bin/.idx pair, or several, or weight prefix pairs")
    numbers = [_as_number(value) for value in values]
    weights = [number for number in numbers if number is not None]
    if not weights:
        prefixes = list(values)
    else:
        if len(values) % 2 or None in numbers[::2] or any(number is not None for number in numbers[1::2]):
            raise UserError(
                f"{flag} takes either prefixes alone or a weight before each prefix, got {' '.join(values)} "
                "(write a prefix that looks like a number as ./NUMBER)"
            )
        for weight, value in zip(weights, values[::2], strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"{flag}: weights must be finite and above 0, got {value}")
        if min(weights) / math.fsum(weights) < 1 / BLOCK:
            raise UserError(
                f"{flag}: weight {min(weights)} is less than 1/{BLOCK} of the sum of all weights, {math.fsum(weights)}"
            )
        prefixes = list(values[1::2])
    return [_without_suffix(prefix) for prefix in prefixes], weights or None


def _as_number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _without_suffix(prefix: str) -> str:
    stem, suffix = os.path.splitext(prefix)
    return stem if suffix in (".bin", ".idx") and not os.path.exists(f"{prefix}.idx") else prefix

"""The order of samples: a keyed permutation of 0..size-1, computed one index at a time.

Nothing is stored or shuffled: `ids(positions)` costs the same at 10 samples and at 10^11, and depends only on seed, pool name and
position. Each epoch of a pool has its own key, hence its own order, and visits every sample exactly once. The permutation is a Feistel
network over the cells of a rectangle a little larger than `size`, with cycle walking back into it (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). It shuffles well; it is no cipher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MAX_SIZE = 1 << 62
SEEDS = "from 0 to 2^63 - 1"
_NUM_ROUNDS = 8
_CHUNK = 1 << 14  # elements that stay in cache over all rounds
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's
_SHIFT_29, _SHIFT_32 = np.uint64(29), np.uint64(32)


def is_seed(number: int) -> bool:
    """Whether a seed is in the range SEEDS: every file format that records a seed can hold it."""
    return 0 <= number < 1 << 63


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of 0..size-1, chosen by `key` (0 <= key < 2^64), takes each index: int [n] -> int64 [n]."""
    return _permute(np.asarray(index, np.int64), size, _round_keys(key)[:, None])


def keyed_ranks(ids: np.ndarray, key: int) -> np.ndarray:
    """A permutation of 0..2^64-1, chosen by `key` (0 <= key < 2^64): int64 [n] -> uint64 [n], no two alike.

    An xor with the key, then splitmix64's multiplications: each step is invertible. The high bits, which decide an order, are mixed best.
    Ten times as fast as `permute`.
    """
    ranks = np.asarray(ids, np.int64).astype(np.uint64)
    for start in range(0, ranks.size, _CHUNK):
        piece = ranks[start : start + _CHUNK]
        piece ^= np.uint64(key)
        piece *= _MULTIPLY_1
        piece ^= piece >> _SHIFT_32
        piece *= _MULTIPLY_2
    return ranks


def key_of(text: str) -> int:
    """A key for `keyed_ranks` or `permute`, the same for the same text: 0 <= key < 2^64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Pool:
    """`size` samples. Each is visited once an epoch, in an order that depends only on (seed, name, epoch)."""

    name: str
    size: int
    seed: int

    def __post_init__(self) -> None:
        assert 1 <= self.size <= MAX_SIZE, self.size

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Samples at these positions of the endless stream of epochs: int [n] >= 0 -> int64 [n], each below `size`."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.size)
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = (
            np.stack([_epoch_keys(self.seed, self.name, epoch) for epoch in distinct.tolist()], axis=1)
            if distinct.size
            else None
        )
        if keys is None:
            return offsets
        return _permute(offsets, self.size, keys if distinct.size == 1 else keys[:, which])

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Position of each sample in the first epoch: int [n] -> int64 [n], each below `size`."""
        return _permute(np.asarray(ids, np.int64), self.size, _epoch_keys(self.seed, self.name, 0)[:, None], _feistel_back)

    def progress(self, drawn: int) -> PoolProgress:
        """The state of the pool after its first `drawn` samples."""
        return PoolProgress(self.name, self.size, drawn)


@dataclass(frozen=True)
class PoolProgress:
    """How much of a pool was drawn, for logs."""

    pool: str
    size: int
    drawn: int

    @property
    def epoch(self) -> int:
        """Epoch that the next sample belongs to, counted from 0."""
        return self.drawn // self.size

    @property
    def num_repeats(self) -> int:
        """Draws that saw a sample for the second time or more."""
        return max(0, self.drawn - self.size)


@lru_cache(maxsize=4096)
def _epoch_keys(seed: int, name: str, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest()
    return _round_keys(int.from_bytes(digest, "little"))


def _round_keys(key: int) -> np.ndarray:
    """uint64 [rounds]."""
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _permute(index: np.ndarray, size: int, keys: np.ndarray, turn: Callable[..., np.ndarray] | None = None) -> np.ndarray:
    """keys: uint64 [rounds, 1], or [rounds, n] where each element has its own permutation. turn: `_feistel` or its inverse."""
    turn = turn or _feistel
    assert 1 <= size <= MAX_SIZE, size
    assert index.size == 0 or (index.min() >= 0 and index.max() < size), (index.min(), index.max(), size)
    if index.size > _CHUNK:
        cuts = range(0, index.size, _CHUNK)
        return np.concatenate(
            [_permute(index[i : i + _CHUNK], size, keys if keys.shape[1] == 1 else keys[:, i : i + _CHUNK], turn) for i in cuts]
        )
    rows = math.isqrt(size - 1) + 1  # rows * columns >= size, with fewer than `rows` cells to spare
    columns = -(-size // rows)
    cells = turn(index.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(cells >= size)
    while outside.size:  # walk the cycle until it is back in [0, size)
        cells[outside] = turn(cells[outside], rows, columns, keys if keys.shape[1] == 1 else keys[:, outside])
        outside = outside[cells[outside] >= size]
    return cells.astype(np.int64)


def _feistel(cells: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0..rows*columns-1: a round turns each row, or each column, by its own pseudo-random amount."""
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for pair in range(0, _NUM_ROUNDS, 2):
        row += _hash_below(column, keys[pair], num_rows)
        row -= num_rows * (row >= num_rows)
        column += _hash_below(row, keys[pair + 1], num_columns)
        column -= num_columns * (column >= num_columns)
    return row * num_columns + column


def _feistel_back(cells: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """The inverse of `_feistel`: the same turns backwards, the last one first."""
    num_rows, num_columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cells, num_columns)
    for pair in range(_NUM_ROUNDS - 2, -1, -2):
        column += num_columns - _hash_below(row, keys[pair + 1], num_columns)
        column -= num_columns * (column >= num_columns)
        row += num_rows - _hash_below(column, keys[pair], num_rows)
        row -= num_rows * (row >= num_rows)
    return row * num_columns + column


def _hash_below(values: np.ndarray, key: np.ndarray, bound: np.uint64) -> np.ndarray:
    """Pseudo-random uint64 [n] in [0, bound) from (value, key); bound <= 2^32."""
    mixed = values ^ key
    mixed *= _MULTIPLY_1
    mixed ^= mixed >> _SHIFT_32
    mixed *= _MULTIPLY_2
    mixed ^= mixed >> _SHIFT_29
    mixed >>= _SHIFT_32
    mixed *= bound
    mixed >>= _SHIFT_32
    return mixed

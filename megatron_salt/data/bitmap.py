"""A bitmap: one bit for each of N numbers, in N/8 bytes of memory. numpy alone.

Bit i & 7 of byte i >> 3 belongs to number i: np.packbits with bitorder="little".
"""

from __future__ import annotations

import numpy as np


def new_bitmap(size: int) -> np.ndarray:
    """No bit is set: uint8 [ceil(size / 8)]."""
    return np.zeros(-(-size // 8), np.uint8)


def set_bits(bitmap: np.ndarray, numbers: np.ndarray) -> None:
    """Set the bits of `numbers`: int64 [n], in any order."""
    np.bitwise_or.at(bitmap, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))


def bits_at(bitmap: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The bits of `numbers`: int64 [n], in any order -> bool [n]."""
    return (bitmap[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).astype(bool)


def bits_between(bitmap: np.ndarray, first: int, end: int) -> np.ndarray:
    """The bits of the numbers [first, end) -> bool [end - first]."""
    unpacked = np.unpackbits(bitmap[first // 8 : -(-end // 8)], bitorder="little")
    return unpacked[first % 8 : first % 8 + end - first].view(bool)

"""A bitmap holds one bit a number. Oracle: a set."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_salt.data.bitmap import bits_at, bits_between, new_bitmap, set_bits


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1001])
def test_exactly_the_bits_that_were_set_are_set(size: int) -> None:
    numbers = np.random.default_rng(size).integers(0, size, 2 * size // 3)  # some come twice
    bitmap = new_bitmap(size)
    set_bits(bitmap, numbers[: size // 3])
    set_bits(bitmap, numbers[size // 3 :])
    expected = np.isin(np.arange(size), numbers)
    assert bitmap.dtype == np.uint8 and len(bitmap) == -(-size // 8)
    assert (np.packbits(expected, bitorder="little") == bitmap).all()
    order = np.random.default_rng(0).permutation(size)
    assert (bits_at(bitmap, order) == expected[order]).all()


def test_a_range_begins_and_ends_at_any_bit() -> None:
    expected = np.random.default_rng(1).random(70) < 0.5
    bitmap = np.packbits(expected, bitorder="little")
    for first in range(70):
        for end in range(first, 71):
            assert bits_between(bitmap, first, end).tolist() == expected[first:end].tolist()

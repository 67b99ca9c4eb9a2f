"""The order is a permutation for every size, epoch, seed and pool, mixes well, and needs no memory."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import numpy as np
import pytest

from megatron_salt.data.order import MAX_SIZE, Pool, PoolProgress, permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4096, 10007, 65535, 65536, 65537, 100_000])
def test_permute_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [10**9, 10**11 + 3, 2**40 - 1, 2**40, 2**40 + 1, 10**18, MAX_SIZE])
def test_permute_is_injective_and_in_range_at_any_size(size: int) -> None:
    index = np.unique(
        np.concatenate([np.arange(5000), size - 1 - np.arange(5000), np.linspace(0, size - 1, 5001).astype(np.int64)])
    )
    index = index[(index >= 0) & (index < size)]
    image = permute(index, size, 42)
    assert image.dtype == np.int64
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(index)
    octiles = np.bincount((image.astype(np.float64) / size * 8).astype(int), minlength=8) / len(image)
    assert np.abs(octiles - 1 / 8).max() < 5 * np.sqrt(1 / 8 / len(image))


def test_an_index_is_mapped_alone_as_in_company() -> None:
    """Oracle: one index at a time. Neither chunks nor cycle walking nor neighbours make a difference."""
    pool = Pool("all", 40_000, seed=3)
    positions = np.arange(35_000, 85_000)  # three epochs, several chunks
    together = pool.ids(positions)
    for place in (0, 1, 4_999, 5_000, 16_383, 16_384, 49_999):
        assert pool.ids(positions[place : place + 1]).tolist() == [together[place]]
    assert pool.ids(positions[::-1]).tolist() == together[::-1].tolist()
    assert pool.ids(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1013])
def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own(size: int) -> None:
    ids = Pool("all", size, seed=1234).ids(np.arange(5 * size)).reshape(5, size)
    for epoch in ids:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size >= 100:
        assert all((ids[a] == ids[b]).mean() < 0.08 for a in range(5) for b in range(a))


def test_seed_name_and_epoch_all_choose_the_order_and_nothing_else_does() -> None:
    positions = np.arange(1000)
    base = Pool("all", 1000, seed=1).ids(positions)
    for other in (
        Pool("all", 1000, seed=2).ids(positions),
        Pool("rest", 1000, seed=1).ids(positions),
        Pool("all", 1000, seed=1).ids(positions + 1000),
        Pool("all", 1000, seed=11).ids(positions),
    ):
        assert (other == base).mean() < 0.01
    assert Pool("all", 1000, seed=1).ids(positions).tolist() == base.tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    """Golden: every run and every checkpoint depend on these numbers. Another algorithm would be other data."""
    two_epochs = Pool("train", 10, seed=1234).ids(np.arange(20)).tolist()
    assert two_epochs == [0, 5, 7, 9, 8, 3, 1, 4, 2, 6, 5, 0, 2, 4, 3, 9, 8, 1, 7, 6]
    assert Pool("train", 10**11, seed=1234).ids(np.array([0, 1, 2, 10**11 - 1, 10**11])).tolist() == [
        95080562731,
        54416232773,
        97451275855,
        94697906829,
        60611045013,
    ]


def chi_square(counts: np.ndarray) -> float:
    """Standard deviations between the counts of equally likely cells and the expectation of chance."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_over_keys_all_orders_of_a_small_pool_are_equally_likely(size: int) -> None:
    orders = [tuple(permute(np.arange(size), size, key).tolist()) for key in range(2400)]
    assert chi_square(np.array([orders.count(order) for order in permutations(range(size))])) < 4


@pytest.mark.parametrize("size", [6, 9, 10, 16, 50, 97])
def test_over_keys_each_sample_is_equally_likely_at_each_position(size: int) -> None:
    orders = np.array([permute(np.arange(size), size, key) for key in range(2000)])
    for position in (0, 1, size // 2, size - 1):
        assert chi_square(np.bincount(orders[:, position], minlength=size)) < 4.5
    fixed_points = (orders == np.arange(size)).sum(1).mean()
    successors = (np.diff(orders, axis=1) == 1).sum(1).mean() * size / (size - 1)
    assert abs(fixed_points - 1) < 0.15 and abs(successors - 1) < 0.15


@pytest.mark.parametrize("size", [4096, 100_003, 10**9])
def test_within_an_epoch_neighbours_are_unrelated(size: int) -> None:
    """Oracle: the high and low bits of neighbours, and their correlations, spread like independent draws."""
    num = min(size, 100_000)
    image = permute(np.arange(num), size, 99)
    cells = (image.astype(np.float64) / size * 16).astype(int)
    assert abs(chi_square(np.bincount(cells[:-1] * 16 + cells[1:], minlength=256))) < 5
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 5 / np.sqrt(num)
    assert abs(np.corrcoef(image, np.arange(num))[0, 1]) < 5 / np.sqrt(num)
    low_bits = np.bincount((image[:-1] & 3) * 4 + (image[1:] & 3), minlength=16)
    assert abs(chi_square(low_bits)) < 5


def test_no_memory_grows_with_the_pool() -> None:
    pool = Pool("all", 10**11, seed=7)
    pool.ids(np.arange(8))
    tracemalloc.start()
    pool.ids(np.arange(10**11 - 512, 10**11 + 512))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 19


@pytest.mark.parametrize("drawn, epoch, num_repeats", [(0, 0, 0), (9, 0, 0), (10, 1, 0), (11, 1, 1), (35, 3, 25)])
def test_progress_counts_epochs_and_repeats(drawn: int, epoch: int, num_repeats: int) -> None:
    assert Pool("all", 10, seed=0).progress(drawn) == PoolProgress("all", 10, drawn)
    assert (PoolProgress("all", 10, drawn).epoch, PoolProgress("all", 10, drawn).num_repeats) == (epoch, num_repeats)

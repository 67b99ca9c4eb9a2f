"""The samples of a pool. Oracle: plain lists and sets."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.order import Pool
from megatron_salt.data.subsets import IdRanges, Selected, Unseen, bisect

EVERYTHING = IdRanges((3, 20, 50), (10, 1, 7))
IDS = [*range(3, 13), 20, *range(50, 57)]


@pytest.mark.parametrize("size", [1, 2, 3, 70, 1013, 40_000])
def test_positions_are_when_the_first_epoch_comes_to_a_sample(size: int) -> None:
    for seed in (0, 1, 2**63 - 1):
        pool = Pool("train", size, seed)
        assert np.array_equal(pool.positions(pool.ids(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [10**9, 2**40 + 1, 1 << 62])
def test_positions_are_right_at_any_size(size: int) -> None:
    pool = Pool("train", size, seed=42)
    positions = np.unique(np.linspace(0, size - 1, 5001).astype(np.int64).clip(0, size - 1))
    assert np.array_equal(pool.positions(pool.ids(positions)), positions)


def test_runs_are_their_ids_end_to_end() -> None:
    assert EVERYTHING.size == len(IDS)
    assert EVERYTHING.ids(np.arange(len(IDS))).tolist() == IDS
    assert EVERYTHING.numbers(np.array(IDS)).tolist() == list(range(len(IDS)))


def test_chosen_ids_are_found_and_others_are_not() -> None:
    chosen = Selected(np.array([4, 5, 20, 56], np.uint32))
    assert chosen.ids(np.array([3, 0])).tolist() == [56, 4]
    numbers, inside = chosen.numbers(np.arange(60))
    assert np.flatnonzero(inside).tolist() == [4, 5, 20, 56] and numbers[inside].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("listed", [IDS, IDS[:1], IDS[-1:], IDS[::2], IDS[1::2], IDS[5:12]])
@pytest.mark.parametrize("drawn", [0, 1, 2, 5, 100])
def test_unseen_is_everything_but_what_was_drawn(listed: list[int], drawn: int) -> None:
    """Oracle: sets. No id comes twice, and samples that were not chosen come first."""
    pool = Pool("train", len(listed), seed=7)
    unseen = Unseen(EVERYTHING, Selected(np.array(listed, np.uint32)), pool, drawn)
    seen = {listed[number] for number in pool.ids(np.arange(drawn)).tolist()}
    ids = unseen.ids(np.arange(unseen.size)).tolist()
    assert len(ids) == len(set(ids)) == unseen.size and set(ids) == set(IDS) - seen
    assert ids[: len(IDS) - len(listed)] == [number for number in IDS if number not in listed]
    assert np.flatnonzero(unseen.saw(np.array(IDS))).tolist() == [place for place, number in enumerate(IDS) if number in seen]


def test_bisect_finds_the_first_number_from_which_on_it_holds() -> None:
    wanted = np.array([0, 1, 5, 9, 10])
    assert bisect(10, 5, lambda numbers, rows: numbers >= wanted[rows]).tolist() == wanted.tolist()
    assert bisect(0, 2, lambda numbers, rows: numbers > 0).tolist() == [0, 0]


def test_no_memory_grows_with_the_selection(tmp_path: Path) -> None:
    """3 * 10^7 chosen of 10^9 in a mapped file: a batch of unseen samples costs as much as any batch."""
    listed = np.lib.format.open_memmap(tmp_path / "ids.npy", "w+", np.uint32, (30_000_000,))
    listed[:] = np.arange(30_000_000, dtype=np.uint32) * 33
    unseen = Unseen(IdRanges((0,), (10**9,)), Selected(listed), Pool("train", len(listed), 1), 10**7)
    numbers = np.linspace(0, unseen.size - 1, 2048).astype(np.int64)
    tracemalloc.start()
    ids = unseen.ids(numbers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    never = ids[numbers < 970_000_000]
    assert (never[never < 990_000_000] % 33 != 0).all() and len(np.unique(ids)) == 2048

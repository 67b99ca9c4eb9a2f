"""Blends: exact shares, every window once an epoch, pure; and the parsing of --data-path."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from megatron_salt.data.blend import BLOCK, Mixture, make_blend, parse_data_path, shares
from megatron_salt.data.order import Pool, PoolProgress
from megatron_salt.errors import UserError

WEIGHTS = [(1.0,), (0.7, 0.3), (1, 1, 1), (30, 1, 8, 0.01, 3.7), tuple(1 / (1 + d) for d in range(33))]


def test_without_weights_every_sample_of_the_one_pool_comes_once_an_epoch() -> None:
    blend = make_blend("train", [18], None, seed=1)
    orders = []
    for epoch in range(3):
        pool, sample = blend.locate(np.arange(18 * epoch, 18 * (epoch + 1)))
        orders.append(sample.tolist())
        assert sorted(sample.tolist()) == list(range(18)) and not pool.any()
    assert orders[0] != orders[1] != orders[2]
    assert blend.progress(40) == [PoolProgress("train", 18, 40)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_by_largest_remainder(weights: tuple[float, ...]) -> None:
    counts = shares(weights)
    assert sum(counts) == BLOCK
    assert all(abs(count - BLOCK * weight / math.fsum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("start", [0, 12_345, BLOCK - 2000, 10**12])
def test_any_prefix_holds_each_dataset_by_its_share(weights: tuple[float, ...], start: int) -> None:
    """Oracle: count the datasets sample by sample from `start` on; progress() is the closed form."""
    blend = make_blend("train", [1000] * len(weights), weights, seed=1)
    dataset, _ = blend.locate(np.arange(start, start + 4000))
    counts = np.array([pool.drawn for pool in blend.progress(start)])
    assert counts.sum() == start
    for length in range(4001):
        share_of_prefix = [(start + length) * count / BLOCK for count in shares(weights)]
        assert np.abs(counts - share_of_prefix).max() <= math.ceil(math.log2(len(weights))) / 2 + 1e-3
        if length % 500 == 0:
            assert counts.tolist() == [pool.drawn for pool in blend.progress(start + length)]
        if length < 4000:
            counts[dataset[length]] += 1


def test_each_block_holds_the_shares_exactly() -> None:
    weights = (30, 1, 8, 0.01, 3.7)
    blend = make_blend("train", [10] * 5, weights, seed=1)
    for blocks in (1, 2, 1000):
        assert [pool.drawn for pool in blend.progress(blocks * BLOCK)] == [blocks * count for count in shares(weights)]


def test_with_weights_each_dataset_has_epochs_of_its_own() -> None:
    """Oracle: the windows of a dataset, in the order of the stream, are its own pool from position 0 without a gap."""
    sizes, weights = [7, 400, 31], [0.5, 0.2, 0.3]
    blend = make_blend("train", sizes, weights, seed=9)
    dataset, window = blend.locate(np.arange(3000))
    for index, size in enumerate(sizes):
        mine = window[dataset == index]
        assert mine.tolist() == Pool(f"train.{index}", size, 9).ids(np.arange(len(mine))).tolist()
        for first in range(0, len(mine) - size + 1, size):
            assert sorted(mine[first : first + size].tolist()) == list(range(size))
        for prefix in range(0, len(mine), 97):
            visits = Counter(mine[:prefix].tolist())
            assert max(visits.values(), default=0) - min((visits[w] for w in range(size)), default=0) <= 1


@pytest.mark.parametrize("weights", [None, (0.2, 0.5, 0.3)])
def test_a_position_is_mapped_alone_as_in_company(weights: tuple[float, ...] | None) -> None:
    blend = make_blend("train", [50, 70, 90] if weights else [210], weights, seed=2)
    dataset, window = blend.locate(np.arange(1000))
    for position in (0, 1, 2, 209, 210, 999):
        one_dataset, one_window = blend.locate(np.array([position]))
        assert (one_dataset.tolist(), one_window.tolist()) == ([dataset[position]], [window[position]])


def test_the_seed_and_the_split_choose_the_windows() -> None:
    def windows(name: str, seed: int) -> list[int]:
        return make_blend(name, [1000, 1000], [1, 1], seed).locate(np.arange(100))[1].tolist()

    assert windows("train", 1) == windows("train", 1)
    assert windows("train", 1) != windows("train", 2)
    assert windows("train", 1) != windows("valid", 1)
    assert windows("train", 1)[::2] != windows("train", 1)[1::2]  # equal sizes, but an order for each dataset


def test_no_memory_grows_with_the_data() -> None:
    blend = make_blend("train", [10**10, 10**11, 5 * 10**10], [0.1, 0.6, 0.3], seed=1)
    blend.locate(np.arange(8))
    tracemalloc.start()
    blend.locate(np.arange(10**12, 10**12 + 1024))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_rare_datasets_are_seen_as_often_as_their_weight_says() -> None:
    blend = make_blend("train", [100, 100], [1e6, 1], seed=1)
    assert isinstance(blend, Mixture)
    assert [pool.drawn for pool in blend.progress(10**9)][1] == pytest.approx(10**9 / 1e6, rel=1e-3)


@pytest.mark.parametrize("values, prefixes, weights", [
    (["web"], ["web"], None),
    (["web", "code"], ["web", "code"], None),
    (["0.7", "web", "3e-1", "code"], ["web", "code"], [0.7, 0.3]),
    (["30", "data/web"], ["data/web"], [30.0]),
    (["./2024", "web"], ["./2024", "web"], None),
    (["data.v1/web.bin", "code.idx"], ["data.v1/web", "code"], None),
    (["web.v2"], ["web.v2"], None),
])  # fmt: skip
def test_data_path_is_prefixes_or_weight_prefix_pairs(
    values: list[str], prefixes: list[str], weights: list[float] | None
) -> None:
    assert parse_data_path(values, "--data-path") == (prefixes, weights)


@pytest.mark.parametrize("values, message", [
    ([], " is missing"),
    (["0.7", "web", "code"], "either prefixes alone or a weight before each prefix, got 0.7 web code"),
    (["0.7", "web", "code", "0.3"], "either prefixes alone or a weight before each prefix"),
    (["web", "0.7"], "either prefixes alone or a weight before each prefix"),
    (["0.7"], "either prefixes alone"),
    (["2024", "2025"], "write a prefix that looks like a number as ./NUMBER"),
    (["0", "web", "1", "code"], "weights must be finite and above 0, got 0$"),
    (["-1", "web", "1", "code"], "weights must be finite and above 0, got -1"),
    (["nan", "web", "1", "code"], "weights must be finite and above 0, got nan"),
    (["inf", "web", "1", "code"], "weights must be finite and above 0, got inf"),
    (["1e-12", "web", "1", "code"], "weight 1e-12 is less than 1/1073741824 of the sum"),
])  # fmt: skip
def test_a_data_path_that_makes_no_sense_is_refused(values: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^--data-path.*{message}"):
        parse_data_path(values, "--data-path")


def test_a_prefix_that_ends_in_bin_is_taken_as_it_is_where_such_a_dataset_exists(tmp_path) -> None:
    (tmp_path / "web.bin.idx").touch()
    assert parse_data_path([f"{tmp_path}/web.bin"], "--data-path")[0] == [f"{tmp_path}/web.bin"]

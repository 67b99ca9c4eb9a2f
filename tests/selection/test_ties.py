"""Of samples of equal score exactly as many are taken as asked, by a keyed order of the ids, and evenly from all parts of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.bitmap import bits_between
from megatron_salt.selection.eligibility import Eligible, find_eligible
from megatron_salt.selection.rules import Rule, choose
from megatron_salt.selection.ties import Ties, below_limit, tie_limits, tie_ranks
from tests.support.selections import manifest_of, write_columns

SCORE = "median_zeroed_10"


def test_no_part_of_the_file_is_preferred_where_all_scores_are_equal(tmp_path: Path) -> None:
    num = 40_000
    columns = {SCORE: np.zeros(num, np.float32), "tokens": np.ones(num, np.uint16)}
    index = write_columns(tmp_path, manifest_of((num,)), **columns)
    may = find_eligible(index, 0.0, None)
    rules = [Rule("top", fraction=0.5, tie_seed=seed) for seed in (0, 0, 1)]
    found = [np.concatenate(list(choose(index, SCORE, rule, may).ids())) for rule in rules]
    for ids in found:
        tenths = np.bincount(ids * 10 // num, minlength=10)
        assert np.abs(tenths - 2000).max() < 5 * 1000**0.5
        assert abs(int((ids % 2).sum()) - 10_000) < 5 * 100
    assert np.array_equal(found[0], found[1])
    assert abs(len(np.intersect1d(found[0], found[2])) - 10_000) < 5 * 100


@pytest.mark.parametrize("deviations", [8.0, 0.1, 1e-6])
def test_a_limit_counts_exactly_as_many_wherever_it_is_first_looked_for(tmp_path: Path, deviations: float) -> None:
    num = 5000
    scores = np.random.default_rng(0).integers(0, 3, num).astype(np.float32)
    index = write_columns(tmp_path, manifest_of((num,)), 2, **{SCORE: scores})
    packed = np.packbits(np.random.default_rng(1).random(num) < 0.7, bitorder="little")
    may = Eligible(packed=packed, held_out=0, empty=0, duplicates=0)
    ids = 100 + np.flatnonzero((scores == 1)[100:] & bits_between(packed, 100, num))
    groups = [Ties(1.0, taken, len(ids)) for taken in (1, 2, len(ids) // 3, len(ids) - 1)]
    limits = tie_limits(index, SCORE, may, (100, num), groups, 3, 64, deviations)
    assert [int((tie_ranks(ids, 3) < np.uint64(limit)).sum()) for limit in limits] == [group.taken for group in groups]


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.5, 1.0])
def test_a_limit_takes_the_samples_whose_rank_is_below_it(share: float) -> None:
    first, num, limit = 12_345, 50_000, 1 << 62
    equal = np.random.default_rng(0).random(num) < share
    expected = equal & (tie_ranks(first + np.arange(num), 3) < np.uint64(limit))
    assert np.array_equal(below_limit(first, equal, limit, 3), expected)

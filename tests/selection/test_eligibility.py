"""Samples may be chosen that were scored, are not held out, have a token that counts, and repeat no earlier sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.data.bitmap import bits_between
from megatron_salt.errors import UserError
from megatron_salt.selection import eligibility
from megatron_salt.selection.eligibility import duplicates, find_eligible, held_out_ranges
from megatron_salt.selection.rules import Rule, choose
from tests.support.selections import manifest_of, write_columns

SCORE = "median_zeroed_10"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_held_out_windows_are_the_last_of_each_dataset(tmp_path: Path, share: float) -> None:
    sizes = (30, 2, 100)
    index = write_columns(tmp_path, manifest_of(sizes), tokens=np.ones(132, np.uint16))
    may = find_eligible(index, share, None)
    expected: list[bool] = []
    for size in sizes:
        held_out = max(1, int(size * share)) if share else 0
        expected += [True] * (size - held_out) + [False] * held_out
    assert may.of(0, 132).tolist() == expected
    assert (may.held_out, may.count(0, 132), may.count(30, 32)) == (
        expected.count(False),
        expected.count(True),
        sum(expected[30:32]),
    )


def test_what_was_not_scored_is_not_chosen_and_counted_once(tmp_path: Path) -> None:
    """A sample with several reasons counts as held out first, then as not scored, then as empty."""
    manifest = manifest_of((300, 700), sample=0.3, sample_seed=5)
    scored = manifest.scored(0, 1000)
    tokens = np.where(scored, np.arange(1000) % 7, 0).astype(np.uint16)
    index = write_columns(
        tmp_path, manifest, 2, **{SCORE: np.where(scored, np.arange(1000), 0).astype(np.float32), "tokens": tokens}
    )
    may = find_eligible(index, 0.1, None)
    in_split = np.ones(1000, bool)
    for first, end in held_out_ranges(manifest, 0.1):
        in_split[first:end] = False
    assert may.of(0, 1000).tolist() == (in_split & scored & (tokens > 0)).tolist()
    assert (may.held_out, may.unscored, may.empty) == (
        100,
        (in_split & ~scored).sum(),
        (in_split & scored & (tokens == 0)).sum(),
    )
    for rule in (Rule("top", fraction=0.3), Rule("bottom", fraction=0.3), Rule("random", fraction=0.4, seed=5)):
        chosen = np.concatenate(list(choose(index, SCORE, rule, may).ids()))
        assert len(chosen) and set(chosen.tolist()) <= set(np.flatnonzero(scored).tolist())


def test_the_scored_part_is_its_seeds_and_the_same_however_it_is_asked() -> None:
    manifest = manifest_of((40_000,), sample=0.25, sample_seed=1)
    scored = manifest.scored(0, 40_000)
    assert (
        np.concatenate([manifest.scored(0, 7), manifest.scored(7, 123), manifest.scored(123, 40_000)]).tolist()
        == scored.tolist()
    )
    assert np.abs(np.bincount(np.flatnonzero(scored) // 4000, minlength=10) - 1000).max() < 5 * 750**0.5
    other = replace(manifest, sample_seed=2).scored(0, 40_000)
    assert abs(int((scored & other).sum()) - 2500) < 5 * 2344**0.5
    assert (scored <= replace(manifest, sample=0.5).scored(0, 40_000)).all()
    assert manifest_of((10,)).scored(2, 9).tolist() == [True] * 7


def test_a_dataset_of_one_window_cannot_be_held_out_from(tmp_path: Path) -> None:
    index = write_columns(tmp_path, manifest_of((30, 1)), tokens=np.ones(31, np.uint16))
    with pytest.raises(UserError, match="--valid-share 0.1: d1 has 1 window of --seq-length 16"):
        find_eligible(index, 0.1, None)


def test_each_sample_that_may_not_be_chosen_counts_once(tmp_path: Path) -> None:
    tokens = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1], np.uint16)
    repeated = np.packbits(np.array([0, 1, 1, 0, 0, 0, 0, 1, 1, 1], bool), bitorder="little")
    may = find_eligible(write_columns(tmp_path, manifest_of((10,)), tokens=tokens), 0.2, repeated)
    assert np.flatnonzero(may.of(0, 10)).tolist() == [0, 4, 5]
    assert (may.held_out, may.empty, may.duplicates) == (2, 3, 2)


def seen_before(values: list[int]) -> list[bool]:
    """The oracle: whether each value came before."""
    seen: set[int] = set()
    return [value in seen or bool(seen.add(value)) for value in values]


@pytest.mark.parametrize("distinct", [1, 3, 300, 10**6])
@pytest.mark.parametrize("max_bytes", [0, 9 * 40, 9 * 200, 1 << 30])
@pytest.mark.parametrize("chunk", [8, 104, 1 << 20])
def test_duplicates_are_what_a_set_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distinct: int, max_bytes: int, chunk: int
) -> None:
    monkeypatch.setattr(eligibility, "CHUNK", chunk)
    random = np.random.default_rng(distinct)
    kinds = random.integers(0, 1 << 64, distinct, np.uint64)
    kinds[:3] = [0, (1 << 64) - 1, 1 << 63][:distinct]
    content = random.choice(kinds, 1001)
    index = write_columns(tmp_path, manifest_of((1001,)), 3, content=content)
    assert bits_between(duplicates(index, max_bytes), 0, 1001).tolist() == seen_before(content.tolist())


def test_hashes_that_crowd_are_taken_in_smaller_ranges(tmp_path: Path) -> None:
    """All hashes are within 2^10 of 2^64: only the last range has some, and it is split until it fits into memory."""
    content = np.random.default_rng(0).integers((1 << 64) - 1024, 1 << 64, 3000, np.uint64)
    index = write_columns(tmp_path, manifest_of((3000,)), content=content)
    assert bits_between(duplicates(index, 9 * 64), 0, 3000).tolist() == seen_before(content.tolist())

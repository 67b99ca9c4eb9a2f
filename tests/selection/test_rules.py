"""A rule chooses what a full sort by (score, tie rank) gives, for any ties, values and chunks; its memory does not grow."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_salt.errors import UserError
from megatron_salt.selection import rules
from megatron_salt.selection.eligibility import Eligible, dataset_ranges, find_eligible, held_out_ranges
from megatron_salt.selection.rules import Choice, Rule, choose, cuts, order_keys, score_of_key
from megatron_salt.selection.score_format import npy_header
from megatron_salt.selection.score_reader import ScoreIndex, Shard
from megatron_salt.selection.ties import TIE_SEED, tie_ranks
from tests.support.selections import manifest_of, write_columns

SCORE = "median_zeroed_10"
SIZES = (37, 2, 100, 3, 58)  # 200 samples
SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, np.inf, -np.inf, 3e38, -3e38, 1e-38], np.float32)
RULES = [
    Rule("top", fraction=0.3), Rule("top", num_samples=1), Rule("top", fraction=1.0), Rule("top", fraction=1e-9),
    Rule("bottom", fraction=0.3), Rule("bottom", num_samples=50), Rule("band", fraction=0.25, skip=0.1),
    Rule("band", num_samples=20, skip=0.5), Rule("band", fraction=0.05, skip=0.4, tie_seed=7),
    Rule("random", fraction=0.4, seed=5), Rule("random", num_samples=3, seed=0),
    Rule("threshold", minimum=1.0), Rule("threshold", minimum=-1.5, maximum=1.5), Rule("threshold", minimum=0.0, maximum=0.0),
]  # fmt: skip


def random_index(tmp_path: Path, seed: int, num_shards: int = 3) -> tuple[ScoreIndex, np.ndarray, np.ndarray]:
    """(index, scores, tokens), with many ties, every special value, and samples without tokens."""
    random = np.random.default_rng(seed)
    scores = random.integers(-4, 5, sum(SIZES)).astype(np.float32) / 2
    odd = random.random(sum(SIZES)) < 0.3
    scores[odd] = random.choice(SPECIAL, int(odd.sum()))
    tokens = random.integers(0, 8, sum(SIZES)).astype(np.uint16)
    return (
        write_columns(tmp_path / f"{seed}", manifest_of(SIZES), num_shards, **{SCORE: scores, "tokens": tokens}),
        scores,
        tokens,
    )


def the_ids(choice: Choice, size: int = 1 << 20) -> list[int]:
    ids = np.concatenate([*choice.ids(size), np.zeros(0, np.int64)])
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all() and len(ids) == choice.count
    return ids.tolist()


def largest_remainder(total: int, there: list[int]) -> list[int]:
    exact = [Fraction(total * size, sum(there)) for size in there]
    counts = [math.floor(share) for share in exact]
    for pool in sorted(range(len(there)), key=lambda i: (counts[i] - exact[i], i))[: total - sum(counts)]:
        counts[pool] += 1
    return counts


def by_sorting(rule: Rule, scores: np.ndarray, may: np.ndarray) -> list[int]:
    """The oracle: sort the samples (of each dataset) by score and tie rank, and take the first."""
    if rule.name == "threshold":
        return np.flatnonzero(
            may & (scores >= rule.minimum) & (scores <= (np.inf if rule.maximum is None else rule.maximum))
        ).tolist()
    pools = (
        [np.arange(first, end) for first, end in dataset_ranges(manifest_of(SIZES))]
        if rule.per_dataset
        else [np.arange(len(scores))]
    )
    pools = [ids[may[ids]] for ids in pools]
    num_eligible = int(may.sum())
    total = rule.num_samples or max(1, int(rule.fraction * num_eligible + 0.5))
    counts = largest_remainder(total, [len(ids) for ids in pools])
    chosen: list[int] = []
    for ids, count in zip(pools, counts, strict=True):
        order = np.lexsort((tie_ranks(ids, rule.tie_seed), scores[ids] if rule.name == "bottom" else -scores[ids]))
        skip = min(int(rule.skip * len(ids) + 0.5), len(ids) - count)
        chosen += ids[order[skip : skip + count]].tolist()
    return sorted(chosen)


def name_of(rule: Rule) -> str:
    return " ".join(f"{name} {value}" for name, value in vars(rule).items() if value)


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name != "random"], ids=name_of)
def test_the_choice_is_what_a_full_sort_gives(tmp_path: Path, rule: Rule, per_dataset: bool) -> None:
    rule = replace(rule, per_dataset=per_dataset and rule.name != "threshold")
    for seed in range(5):
        index, scores, tokens = random_index(tmp_path, seed)
        held_out = {sample_id for first, end in held_out_ranges(index.manifest, 0.05) for sample_id in range(first, end)}
        assert len(held_out) == 1 + 1 + 5 + 1 + 2
        may = np.array([count > 0 and sample_id not in held_out for sample_id, count in enumerate(tokens)])
        found = the_ids(choose(index, SCORE, rule, find_eligible(index, 0.05, None), size=64))
        assert found == by_sorting(rule, scores, may)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_chunks_and_shards_make_no_difference(tmp_path: Path, rule: Rule) -> None:
    if rule.name == "threshold":
        rule = replace(rule, minimum=-2.0, maximum=None)
    index, scores, tokens = random_index(tmp_path, 0)
    other = write_columns(tmp_path / "other", index.manifest, 1, **{SCORE: scores, "tokens": tokens})
    for per_dataset in {False, rule.name != "threshold"}:
        rule = replace(rule, per_dataset=per_dataset)
        whole = the_ids(choose(other, SCORE, rule, find_eligible(other, 0.0, None)))
        for size in (1, 3, 8, 64, 199):
            may = find_eligible(index, 0.0, None)
            assert the_ids(choose(index, SCORE, rule, may, size), size) == whole


def test_keys_have_the_order_of_the_scores_and_give_them_back() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    scores = np.concatenate([scores[~np.isnan(scores)], SPECIAL])
    keys, order = order_keys(scores), np.argsort(scores, kind="stable")
    assert keys.dtype == np.uint32
    assert np.array_equal(np.diff(scores[order].astype(np.float64)) > 0, np.diff(keys[order].astype(np.int64)) > 0)
    assert (np.diff(keys[order].astype(np.int64)) >= 0).all()
    assert all(score_of_key(int(key)) == score for key, score in zip(keys[-500:], scores[-500:], strict=True))


@pytest.mark.parametrize("per_dataset", [False, True])
def test_random_takes_exactly_as_many_and_another_seed_takes_others(tmp_path: Path, per_dataset: bool) -> None:
    num = 40_000
    manifest = manifest_of((num // 4, 3 * num // 4))
    columns = {SCORE: np.zeros(num, np.float32), "tokens": (np.arange(num) % 5).astype(np.uint16)}
    index = write_columns(tmp_path, manifest, **columns)
    may = find_eligible(index, 0.0, None)
    rules = [Rule("random", num_samples=8000, seed=seed, per_dataset=per_dataset) for seed in (1, 2)]
    sets = [set(the_ids(choose(index, SCORE, rule, may))) for rule in rules]
    for chosen in sets:
        assert len(chosen) == 8000 and not any(sample_id % 5 == 0 for sample_id in chosen)
        assert abs(np.mean(sorted(chosen)) / num - 0.5) < 5 * 0.29 / 8000**0.5
        first = sum(sample_id < num // 4 for sample_id in chosen)
        assert first == 2000 if per_dataset else abs(first - 2000) < 5 * (2000 * 0.75) ** 0.5
    assert abs(len(sets[0] & sets[1]) - 2000) < 5 * (2000 * 0.75) ** 0.5


def test_a_choice_has_its_cuts(tmp_path: Path) -> None:
    index, scores, _ = random_index(tmp_path, 1)
    may = find_eligible(index, 0.0, None)

    def at(rule: Rule) -> list[tuple[float, ...]]:
        choice = choose(index, SCORE, rule, may)
        return [cuts(choice, part) for part in choice.ranges]

    chosen = scores[by_sorting(Rule("top", fraction=0.3), scores, may.of(0, 200))]
    assert at(Rule("top", fraction=0.3)) == [(chosen.min(),)]
    chosen = scores[by_sorting(Rule("bottom", fraction=0.3), scores, may.of(0, 200))]
    assert at(Rule("bottom", fraction=0.3)) == [(chosen.max(),)]
    ranked = np.sort(scores[may.of(0, 200)])[::-1]
    skip, count = int(0.1 * len(ranked) + 0.5), int(0.2 * len(ranked) + 0.5)
    assert at(Rule("band", fraction=0.2, skip=0.1)) == [(ranked[skip + count - 1], ranked[skip - 1])]
    assert at(Rule("threshold", minimum=-1.0, maximum=2.0)) == [(-1.0, 2.0)]
    assert at(Rule("random", fraction=0.3, seed=1)) == [()]
    assert len(at(Rule("top", fraction=0.3, per_dataset=True))) == 5


# --- ties -------------------------------------------------------------------------------------------------------------


def decided_by_ties(scores: np.ndarray, may: np.ndarray, chosen: list[int], pools: list[tuple[int, int]]) -> int:
    """The oracle: chosen samples of whose score another eligible sample in the same range is not chosen."""
    taken = np.isin(np.arange(len(scores)), chosen)
    return sum(
        int(np.isin(scores[first:end][taken[first:end]], scores[first:end][may[first:end] & ~taken[first:end]]).sum())
        for first, end in pools
    )


@pytest.mark.parametrize("per_dataset", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_what_ties_decided_is_what_a_look_at_each_sample_says(tmp_path: Path, rule: Rule, per_dataset: bool) -> None:
    rule = replace(rule, per_dataset=per_dataset and rule.name != "threshold")
    counts = []
    for seed in range(5):
        index, scores, tokens = random_index(tmp_path, seed)
        choice = choose(index, SCORE, rule, find_eligible(index, 0.0, None))
        ranges = dataset_ranges(index.manifest) if rule.per_dataset else [(0, len(scores))]
        ranked = rule.name not in ("random", "threshold")
        counts.append(decided_by_ties(scores, tokens > 0, the_ids(choice), ranges) if ranked else 0)
        assert (choice.tied, choice.tie_share) == (counts[-1], counts[-1] / choice.count)
    assert any(counts) or rule.fraction == 1.0 or rule.name in ("random", "threshold")


@pytest.mark.parametrize("common", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.9, 1.0])
def test_digits_are_counted_whether_or_not_most_samples_have_the_same(common: float, wanted: float) -> None:
    random = np.random.default_rng(0)
    digits = np.where(random.random(10_000) < common, 77, random.integers(0, 1 << 16, 10_000)).astype(np.uint32)
    may = random.random(10_000) < wanted
    counts = np.ones(1 << 16, np.int64)
    rules._tally(counts, digits, may)
    assert np.array_equal(counts - 1, np.bincount(digits[may], minlength=1 << 16))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_nan_is_counted_and_refused_unless_it_could_not_be_chosen_anyway(tmp_path: Path) -> None:
    scores, tokens = np.ones(100, np.float32), np.ones(100, np.uint16)
    scores[[7, 70, 71]] = np.nan
    tokens[7] = 0
    index = write_columns(tmp_path, manifest_of((100,)), **{SCORE: scores, "tokens": tokens})
    for rule in RULES:
        for size in (8, 1 << 20):
            with pytest.raises(UserError, match=f"2 eligible samples have NaN as their {SCORE}, sample 70 the first"):
                choose(index, SCORE, rule, find_eligible(index, 0.0, None), size)
    assert choose(index, SCORE, Rule("top", fraction=1.0), find_eligible(index, 0.3, None)).count == 69


@pytest.mark.parametrize(
    "rule, told",
    [
        (Rule("top", num_samples=10), "--num-samples 10 is more than can be chosen: 9 samples are eligible$"),
        (
            Rule("band", num_samples=6, skip=0.5),
            "--num-samples 6 .* 4 samples are eligible after the 5 that --band-skip 0.5 leaves out",
        ),
        (Rule("band", fraction=0.6, skip=0.5), "--fraction 0.6, 5 samples, is more than can be chosen: 4 samples"),
        (Rule("threshold", minimum=100.0), f"no {SCORE} of 9 eligible samples is at least --min-score 100.0$"),
        (Rule("threshold", minimum=2.5, maximum=2.6), "--min-score 2.5 and at most --max-score 2.6"),
    ],
)
def test_a_rule_that_asks_for_too_much_is_refused(tmp_path: Path, rule: Rule, told: str) -> None:
    columns = {SCORE: np.arange(10, dtype=np.float32), "tokens": np.minimum(np.arange(10), 1).astype(np.uint16)}
    index = write_columns(tmp_path, manifest_of((4, 6)), **columns)
    with pytest.raises(UserError, match=told):
        choose(index, SCORE, rule, find_eligible(index, 0.0, None))


def test_where_nothing_may_be_chosen_it_says_why(tmp_path: Path) -> None:
    columns = {SCORE: np.zeros(10, np.float32), "tokens": np.zeros(10, np.uint16)}
    index = write_columns(tmp_path, manifest_of((10,)), **columns)
    with pytest.raises(UserError, match="none of 10 samples.*3 are held out, 7 have no token that counts, 0 are duplicates"):
        choose(index, SCORE, Rule("top", fraction=0.5), find_eligible(index, 0.3, None))


# --- size -------------------------------------------------------------------------------------------------------------


def everything(num: int) -> Eligible:
    return Eligible(packed=np.full(-(-num // 8), 255, np.uint8), held_out=0, empty=0, duplicates=0)


@pytest.mark.long
def test_ten_million_samples_with_many_ties(tmp_path: Path) -> None:
    num = 10**7
    scores = (np.random.default_rng(0).integers(0, 1000, num) / 7).astype(np.float32)
    index = write_columns(tmp_path, manifest_of((num,)), 2, **{SCORE: scores})
    expected = np.sort(np.lexsort((tie_ranks(np.arange(num), TIE_SEED), -scores))[: num // 3])
    choice = choose(index, SCORE, Rule("top", num_samples=num // 3), everything(num))
    assert np.array_equal(np.concatenate(list(choice.ids())), expected)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """Thirty million equal scores, in a sparse file: a few MB are enough."""
    num = 3 * 10**7
    path = tmp_path / f"samples-{0:015d}-{num:015d}"
    path.mkdir()
    with open(path / f"{SCORE}.npy", "wb") as stream:
        stream.write(npy_header(np.dtype(np.float32), num))
        stream.truncate(128 + 4 * num)
    index = ScoreIndex(manifest_of((num // 2, num // 2)), (Shard(path, 0, num, {}),), "--scores")
    may = everything(num)
    tracemalloc.start()
    counts = [len(ids) for ids in choose(index, SCORE, Rule("top", num_samples=num // 10, per_dataset=True), may).ids()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(counts) == num // 10
    assert peak < 64 << 20

"""Which samples a rule chooses by a score. The choice is exact, and a keyed order of the ids decides between equal scores.

Nothing is sorted. Scores become uint32 keys of the same order. Two passes over the column, for 16 bits each, count the keys: they find
the key of the last sample that is taken, and how many samples with that key are taken. Where that is a part of them, `ties.py` finds
which. A last pass emits the ids, ascending. This makes four passes over a column of 4 bytes a sample. Memory: a few MB and the bitmap of
`Eligible`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import numpy as np

from megatron_salt.data.order import key_of, permute
from megatron_salt.errors import UserError
from megatron_salt.selection.eligibility import Eligible, dataset_ranges
from megatron_salt.selection.score_reader import CHUNK, ScoreIndex
from megatron_salt.selection.ties import TIE_SEED, Ties, below_limit, tie_limits

RuleName = Literal["top", "bottom", "band", "threshold", "random"]
_DIGIT = 1 << 16
_SOME = 64  # samples whose median shows a digit that most have
_ALL = 1 << 62  # more ties than there can be


@dataclass(frozen=True)
class Rule:
    """How samples are chosen by a score."""

    name: RuleName
    """top: the highest scores. bottom: the lowest, a control. band: those that follow after the highest `skip` share. threshold: scores
    in [minimum, maximum]. random: any, a control."""
    _: KW_ONLY
    fraction: float | None = None
    """Share of the eligible samples to choose. Either this or num_samples is given; neither with threshold."""
    num_samples: int | None = None
    per_dataset: bool = False
    """Each dataset gives the same share of its eligible samples. Else the rule does not look at datasets."""
    skip: float = 0.0
    """Share of the eligible samples, the highest scores, that a band leaves out."""
    minimum: float | None = None
    maximum: float | None = None
    seed: int | None = None
    """Seed of the random rule; None with the other rules."""
    tie_seed: int = TIE_SEED
    """Orders samples of equal score. Not used with threshold and random."""


@dataclass(frozen=True)
class CutOff:
    """Cut-off of a top-N: all samples with key > `key`, and of those with key == `key` the ones whose tie rank is below `limit`."""

    key: int
    ties: int
    """How many samples with key == `key` are among the N."""
    group: int
    """How many eligible samples have key == `key`."""
    limit: int | None
    """Tie rank; None: all samples with key == `key` are among the N."""


@dataclass(frozen=True, kw_only=True)
class RangeChoice:
    """What is chosen of samples [first, end): those up to the cut-off `upto` that are not up to the cut-off `after`."""

    first: int
    end: int
    eligible: int
    """How many of them may be chosen."""
    count: int
    """How many of them are chosen."""
    after: CutOff | None
    """None with the random rule. Where nothing is left out above the chosen, its N is 0."""
    upto: CutOff | None
    """None with the random rule."""

    @property
    def tied(self) -> int:
        """How many of the chosen samples ties decided: other samples of their score are not chosen."""
        if self.after is None or self.upto is None:
            return 0
        after, upto = self.after, self.upto
        if after.key == upto.key:
            return upto.ties - after.ties if upto.ties - after.ties < upto.group else 0
        return (upto.ties if upto.ties < upto.group else 0) + (after.group - after.ties if after.ties else 0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a rule chooses from an index: cut-offs, of which `ids` makes the list."""

    index: ScoreIndex
    column: str
    rule: Rule
    eligible: Eligible
    ranges: tuple[RangeChoice, ...]
    """One for all samples, or one for each dataset; ascending."""

    @property
    def count(self) -> int:
        return sum(part.count for part in self.ranges)

    @property
    def tied(self) -> int:
        """How many of the chosen samples ties decided: other samples of their score are not chosen."""
        return sum(part.tied for part in self.ranges)

    @property
    def tie_share(self) -> float:
        """Share of the chosen samples that ties decided."""
        return self.tied / max(self.count, 1)

    def ids(self, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The chosen ids, ascending: int64 [n] for each `size` samples."""
        for part in self.ranges:
            yield from self._random(part, size) if self.rule.name == "random" else self._ranked(part, size)

    def _ranked(self, part: RangeChoice, size: int) -> Iterator[np.ndarray]:
        assert part.after is not None and part.upto is not None
        for first, keys, may in _keys(self.index, self.column, self.rule, self.eligible, part.first, part.end, size):
            left_out, best = (_above(first, keys, may, cut_off, self.rule.tie_seed) for cut_off in (part.after, part.upto))
            yield first + np.flatnonzero(best & ~left_out)

    def _random(self, part: RangeChoice, size: int) -> Iterator[np.ndarray]:
        """Number the eligible samples in order, permute the numbers by a key, and take the samples whose number comes out below `count`."""
        assert self.rule.seed is not None
        key, passed = key_of(f"{self.rule.seed}/{part.first}"), 0
        for first in range(part.first, part.end, size):
            ids = first + np.flatnonzero(self.eligible.of(first, min(first + size, part.end)))
            yield ids[permute(np.arange(passed, passed + len(ids)), part.eligible, key) < part.count] if len(ids) else ids
            passed += len(ids)


def choose(index: ScoreIndex, column: str, rule: Rule, eligible: Eligible, size: int = CHUNK) -> Choice:
    """What the rule chooses by a column of float32. UserError where an eligible sample has NaN, where the rule asks for more samples than
    there are, or where it takes none."""
    assert index.dtype(column) == np.float32, column
    _refuse_nan(index, column, eligible, size)
    ranges = dataset_ranges(index.manifest) if rule.per_dataset else [(0, index.num_samples)]
    sizes = [eligible.count(first, end) for first, end in ranges]
    if not sum(sizes):
        raise UserError(
            f"none of {index.num_samples} samples can be chosen: {eligible.held_out} are held out, {eligible.empty} have no "
            f"token that counts, {eligible.duplicates} are duplicates" + not_scored(eligible)
        )
    if rule.name == "threshold":
        return _within_threshold(index, column, rule, eligible, size)
    chosen = []
    for (first, end), num_eligible, (skip, count) in zip(ranges, sizes, _quotas(rule, sizes), strict=True):
        after = upto = None
        if rule.name != "random":
            after, upto = _cut_offs(index, column, rule, eligible, (first, end), (skip, skip + count), size)
        chosen.append(RangeChoice(first=first, end=end, eligible=num_eligible, count=count, after=after, upto=upto))
    return Choice(index=index, column=column, rule=rule, eligible=eligible, ranges=tuple(chosen))


def not_scored(eligible: Eligible) -> str:
    """How many samples were not scored, for a list of reasons; empty where all were scored."""
    return f", {eligible.unscored} were not scored" if eligible.unscored else ""


def order_keys(scores: np.ndarray) -> np.ndarray:
    """Keys in the order of the scores: float32 [n], no NaN -> uint32 [n]. Equal scores have equal keys, and so have -0.0 and 0.0."""
    raw = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0
    return (raw ^ ((raw >> 31) | np.int32(-(1 << 31)))).view(np.uint32)  # flip all bits of a negative score, else the sign bit


def score_of_key(key: int) -> float:
    """The inverse of `order_keys`."""
    raw = key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF)
    return float(np.array(raw, np.uint32).view(np.float32))


def cuts(choice: Choice, part: RangeChoice) -> tuple[float, ...]:
    """The scores at which a rule cuts a range of samples: the last score that is taken (with `bottom` the highest); with a band also the
    last one that is left out above it; with a threshold its limits. Empty where the rule cuts nothing by score."""
    rule = choice.rule
    if rule.name == "threshold":
        return tuple(score for score in (rule.minimum, rule.maximum) if score is not None)
    if part.after is None or part.upto is None or not part.count:
        return ()
    if rule.name == "bottom":
        return (score_of_key(part.upto.key ^ 0xFFFFFFFF),)
    return tuple(score_of_key(cut_off.key) for cut_off in (part.upto, part.after) if cut_off.ties)


def _keys(
    index: ScoreIndex, column: str, rule: Rule, eligible: Eligible, first: int, end: int, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first id, keys uint32 [n], eligible bool [n]) of samples [first, end), by chunks. The best samples have the greatest keys."""
    for start, scores in index.chunks(column, first, end, size):
        keys = order_keys(scores)
        yield start, ~keys if rule.name == "bottom" else keys, eligible.of(start, start + len(scores))


def _above(first: int, keys: np.ndarray, may: np.ndarray, cut_off: CutOff, tie_seed: int) -> np.ndarray:
    """Which of samples first, first + 1, ... are above a cut-off: keys uint32 [n], may (eligible) bool [n] -> bool [n]."""
    if cut_off.limit is None:
        return (keys >= np.uint32(cut_off.key)) & may
    best = (keys > np.uint32(cut_off.key)) & may
    if cut_off.limit:
        best |= below_limit(first, (keys == np.uint32(cut_off.key)) & may, cut_off.limit, tie_seed)
    return best


def _refuse_nan(index: ScoreIndex, column: str, eligible: Eligible, size: int) -> None:
    count, lowest = 0, None
    for first, scores in index.chunks(column, size=size):
        bad = np.isnan(scores)
        if bad.any():
            bad &= eligible.of(first, first + len(scores))
            count += int(np.count_nonzero(bad))
            lowest = first + int(bad.argmax()) if lowest is None and bad.any() else lowest
    if count:
        raise UserError(
            f"{index.flag_name}: {count} eligible samples have NaN as their {column}, sample {lowest} the first: the teacher's "
            "logits were not finite there; look at the teacher and the data, and score again"
        )


def _quotas(rule: Rule, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """For each range of samples: (how many of the best to leave out, how many of the next to take). sizes: eligible samples of each range.
    The total is shared out by largest remainder; of equal remainders the first range comes first."""
    everything = sum(sizes)
    if rule.num_samples is not None:
        total = rule.num_samples
    else:
        assert rule.fraction is not None
        total = max(1, int(rule.fraction * everything + 0.5))
    skip = int(rule.skip * everything + 0.5)
    if skip + total > everything:
        left = f" after the {skip} that --band-skip {rule.skip} leaves out" if skip else ""
        asked = f"--num-samples {total}" if rule.fraction is None else f"--fraction {rule.fraction}, {total} samples,"
        raise UserError(f"{asked} is more than can be chosen: {everything - skip} samples are eligible{left}")
    counts = [total * size // everything for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda number: (-(total * sizes[number] % everything), number))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return [(min(int(rule.skip * size + 0.5), size - count), count) for size, count in zip(sizes, counts, strict=True)]


def _cut_offs(
    index: ScoreIndex, column: str, rule: Rule, eligible: Eligible, bounds: tuple[int, int], ranks: tuple[int, int], size: int
) -> tuple[CutOff, CutOff]:
    """The cut-offs of the best ranks[0] and the best ranks[1] of samples [bounds[0], bounds[1])."""
    high = np.zeros(_DIGIT, np.int64)
    for _, keys, may in _keys(index, column, rule, eligible, *bounds, size):
        _tally(high, keys >> 16, may)
    digits = [_digit_at(high, rank) for rank in ranks]
    low = {digit: np.zeros(_DIGIT, np.int64) for digit, _ in digits}
    for _, keys, may in _keys(index, column, rule, eligible, *bounds, size):
        for digit, counts in low.items():
            _tally(counts, keys & 0xFFFF, (keys >> 16 == digit) & may)
    lowest = [(digit, *_digit_at(low[digit], rest)) for digit, rest in digits]
    cuts = [((digit << 16) + low_digit, ties, int(low[digit][low_digit])) for digit, low_digit, ties in lowest]
    turned = 0xFFFFFFFF if rule.name == "bottom" else 0
    groups = [Ties(score_of_key(key ^ turned), ties, group) for key, ties, group in cuts if 0 < ties < group]
    limits = iter(tie_limits(index, column, eligible, bounds, groups, rule.tie_seed, size) if groups else [])
    after, upto = (
        CutOff(key, ties, group, (next(limits) if ties < group else None) if ties else 0) for key, ties, group in cuts
    )
    return after, upto


def _tally(counts: np.ndarray, digits: np.ndarray, wanted: np.ndarray) -> None:
    """Add to `counts`, int64 [65536], how often each digit occurs among the wanted samples: digits uint32 [n], wanted bool [n].

    A digit that most samples share is the median of any part of them. Counting it takes a quarter of the time of a bincount."""
    if 2 * np.count_nonzero(wanted) > len(digits):
        some = digits[:: len(digits) // _SOME + 1]
        common = np.partition(some, len(some) // 2)[len(some) // 2]
        same = digits == common
        if 2 * np.count_nonzero(same) > len(digits):
            counts[common] += np.count_nonzero(same & wanted)
            wanted = wanted & ~same
    counts += np.bincount(digits[wanted], minlength=_DIGIT)


def _digit_at(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The `rank` greatest samples are all samples with a greater digit, and some with this one: (digit, how many with this one).
    counts: int64 [65536], samples with each digit."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    digit = _DIGIT - 1 - place
    return digit, rank - int(from_top[place] - counts[digit])


def _within_threshold(index: ScoreIndex, column: str, rule: Rule, eligible: Eligible, size: int) -> Choice:
    assert rule.minimum is not None
    highest = 0xFFFFFFFF if rule.maximum is None else int(order_keys(np.array([rule.maximum], np.float32))[0])
    lowest = int(order_keys(np.array([rule.minimum], np.float32))[0])
    num_eligible = eligible.count(0, index.num_samples)
    part = RangeChoice(
        first=0,
        end=index.num_samples,
        eligible=num_eligible,
        count=0,
        after=CutOff(highest, 0, _ALL, 0),
        upto=CutOff(lowest, _ALL, _ALL, None),
    )
    choice = Choice(index=index, column=column, rule=rule, eligible=eligible, ranges=(part,))
    count = sum(len(ids) for ids in choice.ids(size))
    if not count:
        upto = "" if rule.maximum is None else f" and at most --max-score {rule.maximum}"
        raise UserError(f"no {column} of {num_eligible} eligible samples is at least --min-score {rule.minimum}{upto}")
    return replace(choice, ranges=(replace(part, count=count),))

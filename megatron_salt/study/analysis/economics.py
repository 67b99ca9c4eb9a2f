"""What a teacher may cost: shares saved, the cost of scoring, break-even, and over how many runs a teacher must be shared. Pure.

A run with a teacher that passes its baseline's final figure early has saved the rest. That rest is what the teacher's training may cost
before the study would have done better to train the baseline alone. A seed that does not get there saves nothing under any price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_salt.model.flops import flops_per_token
from megatron_salt.planner.time.payback import runs_to_share
from megatron_salt.study.analysis.crossings import SCALES, Crossing, Crossings, Scale, positions
from megatron_salt.study.analysis.ledger import USED, Payer, Preparation, PreparationOf, Spent, number, output_rows


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """What one run's teacher may cost, by FLOPs or by seconds. All figures are None where the log or the preparation does not tell them."""

    seed: int
    reached: bool
    """Whether the run passed its partner's final figure"""
    saved: float | None
    """The partner's whole cost less that of the run up to its crossing, scores and selection included, the teacher's training not. 0 where
    it was not reached; below 0 where even a teacher that is a gift costs more than it saves"""
    share: float | None
    """`saved` / the partner's cost: the teacher's training may cost at most this share of a baseline run"""
    token_share: float | None
    """Tokens that a teacher of this shape can be trained on for `saved`, forward and backward / tokens of the partner. FLOPs only"""
    runs_to_share: int | None
    """Least number of runs that must share the teacher, its scores and the selection before each has saved; None: not known, or no
    number is enough"""


@dataclass(frozen=True, kw_only=True)
class Economics:
    """What an arm with a teacher saves against another arm, by seed."""

    arm: str
    against: str
    figure: str
    unit: Payer
    seeds: tuple[BreakEven, ...]
    scoring_share: float | None
    """Cost of scores and selection / a whole run of the other arm, mean over the seeds; 0 for an arm without scores"""
    told: tuple[str, ...]
    """Seeds that are left out or failed, and why"""

    def __str__(self) -> str:
        """Such as "salt: the teacher's training may cost at most 12.0% to 25.0% of baseline's FLOPs (2 of 3 seeds reached)"."""
        words = "FLOPs" if self.unit == "flops" else "seconds"
        reached = [seed for seed in self.seeds if seed.reached]
        head = f"{self.arm}, by {words}: {len(reached)} of {len(self.seeds)} seeds pass {self.against}'s final {self.figure}"
        if not reached:
            return f"{head}: no teacher pays, however cheap"
        shares = [max(seed.share, 0.0) for seed in reached if seed.share is not None]
        if len(shares) < len(reached):
            return f"{head}: what the teacher may cost is not known"
        if max(shares) <= 0:
            return f"{head}: even so no teacher pays, however cheap"
        text = f"{head}; in those, your teacher's training may cost at most {_span(shares)} of a {self.against} run's {words}"
        tokens = [seed.token_share for seed in reached if seed.token_share is not None]
        if len(tokens) == len(reached):
            text += f", which trains it on {_span(tokens)} of the student's tokens"
        numbers = [seed.runs_to_share for seed in reached if seed.runs_to_share is not None]
        if len(numbers) == len(reached):
            least, most = min(numbers), max(numbers)
            span = f"{least}" if least == most else f"{least} to {most}"
            text += "; it pays in a single run" if most == 1 else f"; it must be shared by at least {span} runs"
        return text


def economics(found: Crossings, preparation_of: PreparationOf, unit: Payer) -> Economics | None:
    """What the teacher of an arm may cost, from the arm's crossings. None where the arm uses no teacher, or no seed is paired."""
    if not found.seeds or "teacher training" not in USED[found.seeds[0].pair.arm.kind]:
        return None
    scoring = [_scoring_share(one, preparation_of, unit) for one in found.seeds]
    known = [share for share in scoring if share is not None]
    return Economics(
        arm=found.arm, against=found.against, figure=found.figure, unit=unit, told=found.told,
        seeds=tuple(_break_even(one, preparation_of, unit) for one in found.seeds),
        scoring_share=math.fsum(known) / len(known) if len(known) == len(scoring) else None,
    )  # fmt: skip


def _break_even(crossing: Crossing, preparation_of: PreparationOf, unit: Payer) -> BreakEven:
    if crossing.step is None:
        return BreakEven(seed=crossing.seed, reached=False, saved=0.0, share=0.0, token_share=None, runs_to_share=None)
    at = positions(crossing.pair.arm, np.array([crossing.step]), Scale(unit, "existed"), preparation_of)
    whole = _whole(crossing, preparation_of, unit)
    if at is None or not whole:
        return BreakEven(seed=crossing.seed, reached=True, saved=None, share=None, token_share=None, runs_to_share=None)
    saved, preparation = whole - float(at[0]), preparation_of(crossing.pair.arm)
    return BreakEven(
        seed=crossing.seed, reached=True, saved=saved, share=saved / whole,
        token_share=_token_share(crossing, preparation, saved) if unit == "flops" else None,
        runs_to_share=_runs_to_share(crossing, preparation, saved, unit),
    )  # fmt: skip


def _whole(crossing: Crossing, preparation_of: PreparationOf, unit: Payer) -> float | None:
    """Cost of the partner's whole run."""
    partner = crossing.pair.against
    assert partner.curve is not None
    at = positions(partner, partner.curve.steps[-1:], Scale(unit, "existed"), preparation_of)
    return None if at is None else float(at[0])


def _token_share(crossing: Crossing, preparation: Preparation, saved: float) -> float | None:
    """See `BreakEven.token_share`. The teacher's output layer has as many rows as the student's."""
    partner = crossing.pair.against
    if partner.config is None or partner.curve is None or preparation.teacher is None or saved <= 0:
        return None
    rows = output_rows(partner.curve, partner.config)
    if rows is None:
        return None
    length = partner.config.training.seq_length
    tokens = float(partner.curve.of_steps["train/consumed_samples"][-1]) * length
    return saved / flops_per_token(preparation.teacher, length, rows) / tokens


def _runs_to_share(crossing: Crossing, preparation: Preparation, saved: float, unit: Payer) -> int | None:
    """The least M with (training + scores + selection) / M <= what the run saves beside them."""
    training, scores = _of_unit(preparation.teacher_training, unit), _scores(crossing, preparation, unit)
    if training is None or scores is None:
        return None
    return runs_to_share(saved + scores, training + scores)


def _scores(crossing: Crossing, preparation: Preparation, unit: Payer) -> float | None:
    """Cost of scores and selection of an arm that uses them; None: not known."""
    if "scoring" not in USED[crossing.pair.arm.kind]:
        return 0.0
    scoring, selection = _of_unit(preparation.scoring, unit), _of_unit(preparation.selection, unit)
    return None if scoring is None or selection is None else scoring + selection


def _of_unit(spent: Spent, unit: Payer) -> float | None:
    return spent.flops if unit == "flops" else spent.seconds


def _scoring_share(crossing: Crossing, preparation_of: PreparationOf, unit: Payer) -> float | None:
    whole = _whole(crossing, preparation_of, unit)
    scores = _scores(crossing, preparation_of(crossing.pair.arm), unit)
    return None if not whole or scores is None else scores / whole


def _span(shares: Sequence[float]) -> str:
    """Such as "12.0%", or "12.0% to 25.0%"."""
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


# --- tables -----------------------------------------------------------------------------------------------------------

SAVING_HEADS = ("arm", "against", "figure", "seed", *(f"saved of its {scale}" for scale in SCALES))
BREAK_EVEN_HEADS = (
    "arm", "against", "by", "seed", "teacher's training may cost", "of a run", "its tokens / the student's", "runs that must share it",
    "scores and selection",
)  # fmt: skip


def saving_rows(found: Sequence[Crossings]) -> list[list[str]]:
    """Rows of SAVING_HEADS: a row for each seed. Below 0%: the run cost more up to its crossing than the whole run of the other arm."""

    def cell(one: Crossing, scale: Scale) -> str:
        share = one.shares.get(scale)
        return "not reached" if one.step is None else "-" if share is None else f"{1 - share:.1%}"

    return [
        [arm.arm, arm.against, arm.figure, str(one.seed), *(cell(one, scale) for scale in SCALES)]
        for arm in found
        for one in arm.seeds
    ]


def break_even_rows(found: Sequence[Economics]) -> list[list[str]]:
    """Rows of BREAK_EVEN_HEADS: a row for each seed."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    return [
        [
            arm.arm, arm.against, "FLOPs" if arm.unit == "flops" else "seconds", str(seed.seed),
            number(seed.saved) if seed.reached else "not reached", percent(seed.share) if seed.reached else "not reached",
            percent(seed.token_share), "-" if seed.runs_to_share is None else str(seed.runs_to_share), percent(arm.scoring_share),
        ]
        for arm in found
        for seed in arm.seeds
    ]  # fmt: skip

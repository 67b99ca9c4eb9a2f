"""When a run passes its paired baseline's final figure, and both at equal steps, FLOPs and seconds. Pure.

A crossing is the first evaluation that is better, as in metrics/arms.py: nothing is interpolated, so evaluations set how fine it is. A run
that never gets there is "not reached" and counts. Values at equal FLOPs or seconds lie between two evaluations and are interpolated.
Positions are those of an account of the teacher: all that went before a run stands before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_salt.metrics.arms import first_better, more_is_better
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.study.analysis.ledger import ACCOUNT_WORDS, ACCOUNTS, Account, PreparationOf, total_before
from megatron_salt.study.analysis.pairs import Pair, pair_runs, value_at
from megatron_salt.study.analysis.statistics import signed
from megatron_salt.study.results import RunResult

Unit = Literal["steps", "flops", "seconds"]
_UNIT_WORDS: dict[Unit, str] = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}


@dataclass(frozen=True)
class Scale:
    """What two runs are measured by."""

    unit: Unit
    account: Account = "existed"
    """Of the teacher; steps have none"""

    def __str__(self) -> str:
        words = _UNIT_WORDS[self.unit]
        return words if self.unit == "steps" else f"{words}, {ACCOUNT_WORDS[self.account]}"


STEPS = Scale("steps")
SCALES: tuple[Scale, ...] = (STEPS, *(Scale(unit, account) for unit in ("flops", "seconds") for account in ACCOUNTS))


def positions(run: RunResult, steps: np.ndarray, scale: Scale, preparation_of: PreparationOf) -> np.ndarray | None:
    """Where a run is after these steps: int [n] -> float64 [n]. None: its log or its preparation does not tell."""
    curve = run.curve
    if curve is None or (scale.unit == "flops" and curve.flops is None) or (scale.unit == "seconds" and not curve.is_whole):
        return None
    if scale.unit == "steps":
        return steps.astype(np.float64)
    charged = total_before(run.kind, preparation_of(run), scale.account, scale.unit)
    return None if charged is None else curve.when(scale.unit, steps) + charged


# --- crossings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """When one run passed the final figure of its partner."""

    pair: Pair
    target: float
    """The partner's figure after its last step"""
    step: int | None
    """Of the first evaluation that is better; None: not reached"""
    shares: Mapping[Scale, float | None]
    """Position at that step / position of the partner's end. None: not known. Empty: not reached"""

    @property
    def seed(self) -> int:
        return self.pair.seed


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """The crossings of an arm, by seed."""

    arm: str
    against: str
    figure: str
    seeds: tuple[Crossing, ...]
    """Every seed whose partner has a final figure; a run that failed has not reached it"""
    told: tuple[str, ...]
    """Seeds that are left out or failed, and why"""

    @property
    def reached(self) -> tuple[Crossing, ...]:
        """Those that got there."""
        return tuple(one for one in self.seeds if one.step is not None)

    def summary(self, scale: Scale) -> str:
        """Such as "2 of 3 reached, at 74.0%, 81.0%"; "-" where no seed is paired."""
        if not self.seeds:
            return "-"
        shares = [one.shares[scale] for one in self.reached]
        at = ", ".join("?" if share is None else f"{share:.1%}" for share in shares)
        return f"{len(shares)} of {len(self.seeds)} reached" + (f", at {at}" if at else "")

    def __str__(self) -> str:
        """Such as "salt passes baseline's final valid/loss in 2 of 3 seeds, at 74.0%, 81.0% of its steps", and what is left out."""
        told = f" ({'; '.join(self.told)})" if self.told else ""
        at = ", ".join(f"{one.shares[STEPS]:.1%}" for one in self.reached)
        when = f", at {at} of its steps" if at else ""
        return f"{self.arm} passes {self.against}'s final {self.figure} in {len(self.reached)} of {len(self.seeds)} seeds{when}{told}"


def crossings(results: Sequence[RunResult], preparation_of: PreparationOf, arm: str, against: str, figure: str) -> Crossings:
    """When each run of an arm first was better than its partner at the end. UserError for a label that no run has."""
    pairing = pair_runs(results, arm, against)
    found, told = [], list(pairing.told)
    for pair in sorted((*pairing.pairs, *pairing.lost), key=lambda pair: pair.seed):
        assert pair.against.curve is not None
        target = value_at(pair.against.curve, figure, int(pair.against.curve.steps[-1]))
        if isinstance(target, str):
            told.append(f"seed {pair.seed}: {pair.against.label}: {target}")
            continue
        step = None
        if pair.arm.state == "finished" and pair.arm.curve is not None:
            values = _finite(pair.arm, figure)
            if not values:
                told.append(f"seed {pair.seed}: {pair.arm.label}: no {figure} in its log")
                continue
            step = first_better(np.array([*values]), np.array([*values.values()]), target, figure)
        shares = {} if step is None else {scale: _share(pair, step, scale, preparation_of) for scale in SCALES}
        found.append(Crossing(pair=pair, target=target, step=step, shares=shares))
    return Crossings(arm=arm, against=against, figure=figure, seeds=tuple(found), told=tuple(told))


def _finite(run: RunResult, figure: str) -> dict[int, float]:
    """{step: value} of a figure, ascending, without values that are not finite; empty where the log lacks it."""
    if run.curve is None or figure not in run.curve.names:
        return {}
    return {step: value for step, value in run.curve.figure(figure).items() if math.isfinite(value)}


def _share(pair: Pair, step: int, scale: Scale, preparation_of: PreparationOf) -> float | None:
    assert pair.against.curve is not None
    at = positions(pair.arm, np.array([step]), scale, preparation_of)
    end = positions(pair.against, pair.against.curve.steps[-1:], scale, preparation_of)
    return None if at is None or end is None or end[0] <= 0 else float(at[0] / end[0])


CROSSING_HEADS = ("arm", "against", "figure", *(f"of its {scale}" for scale in SCALES))


def crossing_rows(found: Sequence[Crossings]) -> list[list[str]]:
    """Rows of CROSSING_HEADS."""
    return [[one.arm, one.against, one.figure, *(one.summary(scale) for scale in SCALES)] for one in found]


# --- equal steps, FLOPs, seconds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """Two runs of a seed at one position."""

    seed: int
    position: float
    """The end of the run that ends first"""
    arm: float
    against: float
    """The figure of each there"""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A figure of two arms at equal steps, FLOPs or seconds, by seed."""

    arm: str
    against: str
    figure: str
    scale: Scale
    seeds: tuple[Match, ...]
    told: tuple[str, ...]
    """Seeds that are left out, and why"""

    @property
    def num_better(self) -> int:
        """Seeds in which the arm is better, not as good."""
        sign = 1 if more_is_better(self.figure) else -1
        return sum(sign * (one.arm - one.against) > 0 for one in self.seeds)

    @property
    def mean_difference(self) -> float | None:
        """Mean of arm - against; None without a seed."""
        return math.fsum(one.arm - one.against for one in self.seeds) / len(self.seeds) if self.seeds else None


def matched(
    results: Sequence[RunResult], preparation_of: PreparationOf, arm: str, against: str, figure: str, scale: Scale
) -> Matched:
    """A figure of both runs of each seed where the one that ends first ends. UserError for a label that no run has."""
    pairing = pair_runs(results, arm, against)
    found, told = [], list(pairing.told)
    for pair in pairing.pairs:
        lines = [_line(run, figure, scale, preparation_of) for run in (pair.arm, pair.against)]
        reasons = [line for line in lines if isinstance(line, str)]
        if reasons:
            told.append(f"seed {pair.seed}: {'; '.join(reasons)}")
            continue
        (own_at, own), (other_at, other) = (line for line in lines if not isinstance(line, str))
        position = float(min(own_at[-1], other_at[-1]))
        if position < max(own_at[0], other_at[0]):
            told.append(f"seed {pair.seed}: one run ends before the other's first evaluation, by {scale}")
            continue
        found.append(
            Match(pair.seed, position, float(np.interp(position, own_at, own)), float(np.interp(position, other_at, other)))
        )
    return Matched(arm=arm, against=against, figure=figure, scale=scale, seeds=tuple(found), told=tuple(told))


def _line(run: RunResult, figure: str, scale: Scale, preparation_of: PreparationOf) -> tuple[np.ndarray, np.ndarray] | str:
    """(positions, values) of a figure, ascending: float64 [n] each. A text says why there are none."""
    values = _finite(run, figure)
    if not values:
        return f"{run.label}: no {figure} in its log"
    at = positions(run, np.array([*values]), scale, preparation_of)
    return f"{run.label}: {scale} are not known" if at is None else (at, np.array([*values.values()], np.float64))


MATCHED_HEADS = ("arm", "against", "figure", "at equal", "seeds", "better in", "mean", "mean of the other", "mean difference")


def matched_rows(found: Sequence[Matched]) -> list[list[str]]:
    """Rows of MATCHED_HEADS."""
    rows = []
    for one in found:
        count, difference = len(one.seeds), one.mean_difference
        means = [math.fsum(values) / count for values in zip(*((seed.arm, seed.against) for seed in one.seeds), strict=True)]
        rows.append(
            [one.arm, one.against, one.figure, str(one.scale), str(count), f"{one.num_better} of {count}",
             *(map(figure_text, means) if means else ("-", "-")), "-" if difference is None else signed(difference)]
        )  # fmt: skip
    return rows


# --- student and teacher ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TeacherCrossover:
    """When a student passed its teacher."""

    label: str
    seed: int
    set_name: str
    """The held-out set, such as "valid/prose" """
    teacher_accuracy: float
    step: int | None
    """Of the first evaluation in which the student predicts more tokens than the teacher; None: not reached"""


def teacher_crossovers(results: Sequence[RunResult]) -> list[TeacherCrossover]:
    """For every run with a log and each held-out set on which a teacher was evaluated.

    A run without a teacher, such as a baseline, is held against the one of the first run with its seed that has one, else of any run.
    """
    logged = [run for run in results if run.curve is not None]
    taught = [(run, _teacher_accuracies(run)) for run in logged]
    found = []
    for run, own in taught:
        others = sorted(((other.seed != run.seed, number) for number, (other, theirs) in enumerate(taught) if theirs))
        accuracies = own or (taught[others[0][1]][1] if others else {})
        for name, accuracy in accuracies.items():
            values = _finite(run, f"{name}/accuracy")
            step = first_better(np.array([*values]), np.array([*values.values()]), accuracy, "accuracy")
            found.append(TeacherCrossover(run.label, run.seed, name, accuracy, step))
    return found


def _teacher_accuracies(run: RunResult) -> dict[str, float]:
    """{name of a held-out set: accuracy of the teacher, in the last evaluation that had one}."""
    assert run.curve is not None
    ending = "/teacher_accuracy"
    return {
        name.removesuffix(ending): values[max(values)]
        for name, values in run.curve.of_evaluations.items()
        if name.endswith(ending) and math.isfinite(values[max(values)])
    }


CROSSOVER_HEADS = ("run", "seed", "held-out set", "teacher's accuracy", "student passes it at step")


def crossover_rows(found: Sequence[TeacherCrossover]) -> list[list[str]]:
    """Rows of CROSSOVER_HEADS."""
    return [
        [one.label, str(one.seed), one.set_name, f"{one.teacher_accuracy:.2%}",
         "not reached" if one.step is None else str(one.step)]
        for one in found
    ]  # fmt: skip

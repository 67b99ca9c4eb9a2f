"""Paired differences between two arms: mean, spread, 95% interval, and the verdict on the one primary question. Pure.

The interval is Student's t over the differences of paired seeds: mean +- t sd / sqrt(n), with n - 1 degrees of freedom. It is given for the
primary question alone, which stands before the runs, and from three seeds on. All other comparisons are exploratory: signs, no verdict.
The quantile of t comes from its closed form for whole degrees of freedom, so a study needs no scipy, whose figures the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_salt.metrics.arms import more_is_better
from megatron_salt.metrics.figure_text import figure_text
from megatron_salt.study.analysis.pairs import pair_runs, value_at
from megatron_salt.study.results import RunResult

Verdict = Literal["yes", "no", "unclear", "direction only", "exploratory", "no pair"]
"""yes, no: the interval of the primary question excludes 0, and the arm is better, or worse. unclear: it does not exclude 0.
direction only: the primary question with one or two pairs. exploratory: any other comparison. no pair: no seed to compare."""

LEAST_SEEDS = 3
"""Of an interval and a verdict."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of an arm less that of another, by seed."""

    arm: str
    against: str
    figure: str
    step: int | None
    """After this step of both; None: after the last step of each"""
    primary: bool
    """Whether this is the one question that the study states before its runs"""
    seeds: tuple[int, ...]
    """Those that are paired"""
    differences: tuple[float, ...]
    """arm - against, one for each of `seeds`"""
    told: tuple[str, ...]
    """Seeds that are left out, and why"""

    @property
    def mean(self) -> float | None:
        """Mean difference; None without a pair."""
        return math.fsum(self.differences) / len(self.differences) if self.differences else None

    @property
    def sd(self) -> float | None:
        """Standard deviation of the differences, n - 1 below the line; None with fewer than two."""
        mean, count = self.mean, len(self.differences)
        if mean is None or count < 2:
            return None
        return math.sqrt(math.fsum((one - mean) ** 2 for one in self.differences) / (count - 1))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the mean difference; None where the comparison is exploratory or has fewer than LEAST_SEEDS pairs."""
        if not self.primary or len(self.differences) < LEAST_SEEDS:
            return None
        return t_interval(self.differences)

    @property
    def num_better(self) -> int:
        """Seeds in which the arm is better, not as good."""
        sign = 1 if more_is_better(self.figure) else -1
        return sum(sign * difference > 0 for difference in self.differences)

    @property
    def verdict(self) -> Verdict:
        """See `Verdict`."""
        if not self.differences:
            return "no pair"
        if not self.primary:
            return "exploratory"
        interval = self.interval
        if interval is None:
            return "direction only"
        low, high = interval if more_is_better(self.figure) else (-interval[1], -interval[0])
        return "yes" if low > 0 else "no" if high < 0 else "unclear"

    def __str__(self) -> str:
        """The answer in a sentence, and what is left out."""
        at = "at the last step" if self.step is None else f"at step {self.step}"
        about = f"{self.arm} against {self.against}, {self.figure} {at}"
        left_out = f" Left out: {'; '.join(self.told)}." if self.told else ""
        mean, count = self.mean, len(self.seeds)
        if mean is None:
            return f"No pair: {about}: no seed can be compared.{left_out}"
        seeds = f"better in {self.num_better} of {_seeds(count)}, mean difference {signed(mean)}"
        if self.interval is not None:
            seeds += f", 95% interval {signed(self.interval[0])} to {signed(self.interval[1])}"
        return f"{self.verdict.capitalize()}: {about}: {seeds}.{left_out}"


def compare(
    results: Sequence[RunResult], arm: str, against: str, figure: str, *, step: int | None = None, primary: bool = False
) -> Comparison:
    """Compare an arm with another by seed, after a step of both, or after the last step of each.

    arm: a label; against: a label or the name of an arm, see `pair_runs`. A pair without the figure, or where it is not finite, is told
    and left out. UserError for a label that no run has.
    """
    pairing = pair_runs(results, arm, against)
    told, seeds, differences = list(pairing.told), [], []
    for pair in pairing.pairs:
        values = []
        for run in (pair.arm, pair.against):
            assert run.curve is not None
            value = value_at(run.curve, figure, int(run.curve.steps[-1]) if step is None else step)
            if isinstance(value, str):
                told.append(f"seed {pair.seed}: {run.label}: {value}")
            else:
                values.append(value)
        if len(values) == 2:
            seeds.append(pair.seed)
            differences.append(values[0] - values[1])
    return Comparison(
        arm=arm, against=against, figure=figure, step=step, primary=primary, seeds=tuple(seeds), differences=tuple(differences),
        told=tuple(told),
    )  # fmt: skip


# --- Student's t ------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of at least two values, were they drawn from a normal distribution."""
    count = len(values)
    mean = math.fsum(values) / count
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(confidence, count - 1) * sd / math.sqrt(count)
    return mean - half, mean + half


def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence, T having `freedom` degrees of freedom. To rounding: 60 halvings of an angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _share_within(angle: float, freedom: int) -> float:
    """P(|T| < t), t = sqrt(freedom) tan(angle): Abramowitz and Stegun 26.7.3 and 26.7.4.

    odd:  2/pi (a + sin a (cos a + 2/3 cos^3 a + ... + (2 4 ... (f-3)) / (3 5 ... (f-2)) cos^(f-2) a))
    even: sin a (1 + 1/2 cos^2 a + ... + (1 3 ... (f-3)) / (2 4 ... (f-2)) cos^(f-2) a)
    """
    odd = freedom % 2 == 1
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for number in range(2, freedom + (0 if odd else 1), 2):
        total += term
        below, above = (number, number + 1) if odd else (number - 1, number)
        term *= below / above * math.cos(angle) ** 2
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside


# --- tables -----------------------------------------------------------------------------------------------------------

COMPARISON_HEADS = (
    "arm", "against", "figure", "after", "seeds", "better in", "mean difference", "sd", "95% interval", "verdict",
)  # fmt: skip


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Rows of COMPARISON_HEADS. `Comparison.told` has what does not fit into a table."""
    return [
        [
            one.arm, one.against, one.figure, "last step" if one.step is None else f"step {one.step}", str(len(one.seeds)),
            f"{one.num_better} of {len(one.seeds)}", "-" if one.mean is None else signed(one.mean),
            "-" if one.sd is None else figure_text(one.sd),
            "-" if one.interval is None else f"{signed(one.interval[0])} to {signed(one.interval[1])}", one.verdict,
        ]
        for one in comparisons
    ]  # fmt: skip


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{'+' if value > 0 else ''}{figure_text(value)}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"

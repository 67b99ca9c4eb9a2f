"""Paired differences: intervals against printed tables, scipy and simulation, and the verdict on the primary question."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_salt.study.analysis.statistics import compare, comparison_rows, t_interval, t_quantile
from megatron_salt.study.results import RunResult
from tests.study.analysis.runs import LOSS, falling, run

# Tables in print: 97.5% and 99.5% points of t.
PRINTED = [
    (0.95, {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 60: 2.000, 120: 1.980}),
    (0.99, {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 10: 3.169, 30: 2.750, 120: 2.617}),
]  # fmt: skip


@pytest.mark.parametrize("confidence, table", PRINTED)
def test_quantiles_are_those_of_printed_tables(confidence: float, table: dict[int, float]) -> None:
    assert {freedom: round(t_quantile(confidence, freedom), 3) for freedom in table} == table


def test_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 101):
        assert t_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12), freedom


def test_an_interval_contains_the_truth_19_times_in_20() -> None:
    """Five standard errors of a share over 4,000 draws are 1.7%."""
    draws = np.random.default_rng(7).normal(0.3, 2.0, (4000, 3))
    intervals = [t_interval(draw.tolist()) for draw in draws]
    assert abs(np.mean([low < 0.3 < high for low, high in intervals]) - 0.95) < 0.017


def study(differences: list[float], figure: str = LOSS) -> list[RunResult]:
    """A baseline that ends at 4, and an arm that ends at 4 + difference."""
    return [
        one
        for seed, difference in enumerate(differences, 1)
        for one in (
            run("baseline", seed, {figure: {0: 9.0, 5: 6.0, 10: 4.0}}),
            run("salt", seed, {figure: {0: 9.0, 5: 6.5, 10: 4.0 + difference}}),
        )
    ]


def test_mean_spread_and_interval_are_those_of_the_paired_differences() -> None:
    """By hand: mean -0.2, sd 0.1, 4.302653 x 0.1 / sqrt(3) = 0.248414."""
    found = compare(study([-0.1, -0.2, -0.3]), "salt", "baseline", LOSS, primary=True)
    assert found.seeds == (1, 2, 3) and found.differences == pytest.approx((-0.1, -0.2, -0.3))
    assert (found.mean, found.sd) == pytest.approx((-0.2, 0.1))
    assert found.interval == pytest.approx((-0.448414, 0.048414), abs=1e-6)
    assert str(found) == (
        "Unclear: salt against baseline, valid/loss at the last step: better in 3 of 3 seeds, mean difference -0.2000, "
        "95% interval -0.4484 to +0.0484."
    )
    assert comparison_rows([found]) == [
        ["salt", "baseline", LOSS, "last step", "3", "3 of 3", "-0.2000", "0.1000", "-0.4484 to +0.0484", "unclear"]
    ]


@pytest.mark.parametrize(
    "differences, figure, verdict",
    [
        ([-0.20, -0.21, -0.22], LOSS, "yes"),
        ([0.20, 0.21, 0.22], LOSS, "no"),
        ([0.20, 0.21, 0.22], "valid/accuracy", "yes"),
        ([-0.20, -0.21, -0.22], "valid/accuracy", "no"),
        ([-0.20, 0.01, -0.22], LOSS, "unclear"),
        ([0.0, 0.0, 0.0], LOSS, "unclear"),
        ([-0.20, -0.21], LOSS, "direction only"),
        ([-0.20], LOSS, "direction only"),
    ],
)
def test_the_primary_question_is_answered_where_the_interval_excludes_0(
    differences: list[float], figure: str, verdict: str
) -> None:
    found = compare(study(differences, figure), "salt", "baseline", figure, primary=True)
    assert found.verdict == verdict and (found.interval is None) == (len(differences) < 3)


def test_everything_else_is_exploratory_and_has_signs_alone() -> None:
    found = compare(study([-0.20, -0.21, -0.22]), "salt", "baseline", LOSS)
    assert found.verdict == "exploratory" and found.interval is None and found.num_better == 3
    assert str(found).startswith("Exploratory: salt against baseline, valid/loss at the last step: better in 3 of 3 seeds")
    middle = compare(study([-0.20, -0.21]), "salt", "baseline", LOSS, step=5)
    assert middle.differences == (0.5, 0.5) and middle.num_better == 0 and " at step 5: " in str(middle)


def test_a_seed_that_is_as_good_is_not_better() -> None:
    assert compare(study([0.0, -0.1]), "salt", "baseline", LOSS).num_better == 1


def test_a_failed_run_leaves_its_seed_out_and_is_told() -> None:
    results = study([-0.20, -0.21, -0.22])
    results += [run("baseline", 4, falling(9.0, 4.0)), run("salt", 4, falling(9.0, 1.0), state="failed", reason="loss is nan")]
    found = compare(results, "salt", "baseline", LOSS, primary=True)
    assert found.seeds == (1, 2, 3) and found.verdict == "yes"
    assert str(found).endswith(" Left out: seed 4: salt failed: loss is nan.")


def test_a_figure_that_is_missing_or_not_finite_is_told() -> None:
    results = study([-0.1, -0.2])
    results += [run("baseline", seed, {LOSS: {10: 4.0}}) for seed in (3, 4, 5)]
    results += [
        run("salt", 3, {LOSS: {10: math.nan}}), run("salt", 4, {LOSS: {8: 1.0}}), run("salt", 5, {"valid/accuracy": {10: 1.0}}),
    ]  # fmt: skip
    found = compare(results, "salt", "baseline", LOSS, primary=True)
    assert found.seeds == (1, 2) and found.verdict == "direction only"
    assert found.told == (
        "seed 3: salt: valid/loss is not finite at step 10",
        "seed 4: salt: no valid/loss at step 10",
        "seed 5: salt: no valid/loss in its log",
    )


def test_without_a_pair_there_is_no_answer() -> None:
    results = [run("baseline", 1, falling(9.0, 4.0)), run("salt", 2, falling(9.0, 4.0))]
    found = compare(results, "salt", "baseline", LOSS, primary=True)
    assert found.verdict == "no pair" and found.mean is None and found.sd is None
    assert str(found) == (
        "No pair: salt against baseline, valid/loss at the last step: no seed can be compared. "
        "Left out: seed 1: no run of salt; seed 2: no run of baseline."
    )
    assert comparison_rows([found])[0][4:] == ["0", "0 of 0", "-", "-", "-", "no pair"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=8))
def test_the_same_question_the_other_way_round_has_the_opposite_answer(differences: list[float]) -> None:
    results = study(differences)
    there = compare(results, "salt", "baseline", LOSS, primary=True)
    back = compare(results, "baseline", "salt", LOSS, primary=True)
    assert there.interval is not None and back.interval is not None
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert {"yes": "no", "no": "yes"}.get(there.verdict, there.verdict) == back.verdict

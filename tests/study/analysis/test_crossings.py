"""Crossings and matched comparisons on curves with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_salt.metrics.arms import arms_of, passing
from megatron_salt.study.analysis.crossings import (
    CROSSING_HEADS,
    CROSSOVER_HEADS,
    MATCHED_HEADS,
    SCALES,
    STEPS,
    Scale,
    crossing_rows,
    crossings,
    crossover_rows,
    matched,
    matched_rows,
    teacher_crossovers,
)
from megatron_salt.study.analysis.ledger import UNKNOWN, Preparation, Spent
from tests.study.analysis.runs import LOSS, STUDENT_STEP, TEACHER, TEACHER_STEP, falling, run

PREPARATION = Preparation(
    teacher=TEACHER, teacher_training=Spent(3 * STUDENT_STEP, 6.0), scoring=Spent(STUDENT_STEP, 2.0), runs_that_share=3,
)  # fmt: skip
"""Training costs as much as 3 steps of the student, by FLOPs and by seconds; scoring as much as one."""
BASELINE = run("baseline", 1, falling(9.0, 7.0, 6.0, 5.0, 4.5, 4.0))


def test_a_crossing_is_the_first_better_evaluation_under_every_account() -> None:
    """The arm is as good at step 6 and better at step 8 of 10. Its teacher takes a ninth of a step's FLOPs in 3 steps: a third in all."""
    salt = run("salt", 1, falling(9.0, 6.0, 5.0, 4.0, 3.5, 3.0), teacher_steps=3)
    found = crossings([BASELINE, salt], lambda _: PREPARATION, "salt", "baseline", LOSS)
    (one,) = found.seeds
    assert (one.seed, one.target, one.step) == (1, 4.0, 8)
    assert one.shares == pytest.approx(
        {
            STEPS: 0.8, Scale("flops", "existed"): 8 / 10 + 1 / 30, Scale("flops", "trained"): 11 / 10 + 1 / 30,
            Scale("flops", "shared"): 9 / 10 + 1 / 30, Scale("seconds", "existed"): 16 / 20, Scale("seconds", "trained"): 22 / 20,
            Scale("seconds", "shared"): 18 / 20,
        }
    )  # fmt: skip
    assert str(found) == "salt passes baseline's final valid/loss in 1 of 1 seeds, at 80.0% of its steps"
    assert crossing_rows([found])[0][3:6] == [
        "1 of 1 reached, at 80.0%",
        "1 of 1 reached, at 83.3%",
        "1 of 1 reached, at 113.3%",
    ]
    assert len(crossing_rows([found])[0]) == len(CROSSING_HEADS)


def test_scores_are_paid_before_the_first_step() -> None:
    salt_ds = run("salt_ds", 1, falling(9.0, 3.0, 3.0, 3.0, 3.0, 3.0))
    (one,) = crossings([BASELINE, salt_ds], lambda _: PREPARATION, "salt_ds", "baseline", LOSS).seeds
    assert one.step == 2 and one.shares[Scale("flops", "existed")] == pytest.approx(3 / 10)
    assert one.shares[Scale("seconds", "shared")] == pytest.approx((4 + 8 / 3) / 20)


def test_a_run_that_never_gets_there_is_not_reached_and_a_failed_one_neither() -> None:
    results = [replace(BASELINE, seed=seed) for seed in (1, 2, 3, 4, 5)]
    results += [
        run("salt", 1, falling(9.0, 6.0, 5.0, 4.5, 3.5, 3.0)),
        run("salt", 2, falling(9.0, 6.0, 5.0, 4.5, 4.25, 4.0)),
        run("salt", 3, falling(9.0, 3.0, 3.0), state="failed", reason="the loss is not finite"),
        run("salt", 4, falling(9.0, 3.0), state="running"),
    ]
    found = crossings(results, lambda _: PREPARATION, "salt", "baseline", LOSS)
    assert [(one.seed, one.step) for one in found.seeds] == [(1, 8), (2, None), (3, None)]
    assert found.summary(STEPS) == "1 of 3 reached, at 80.0%"
    assert found.told == ("seed 3: salt failed: the loss is not finite", "seed 4: salt is running", "seed 5: no run of salt")
    nobody = crossings(results[:5] + results[6:7], lambda _: PREPARATION, "salt", "baseline", LOSS)
    assert nobody.summary(STEPS) == "0 of 1 reached"
    assert str(nobody).startswith("salt passes baseline's final valid/loss in 0 of 1 seeds (seed 1: no run of salt")


def test_a_baseline_without_a_final_figure_gives_no_target() -> None:
    results = [
        run("baseline", 1, {LOSS: {0: 9.0, 10: math.nan}}), run("baseline", 2, {LOSS: {0: 9.0, 8: 4.0}}), replace(BASELINE, seed=3),
        *(run("salt", seed, falling(9.0, 3.0)) for seed in (1, 2)), run("salt", 3, {}),
    ]  # fmt: skip
    found = crossings(results, lambda _: PREPARATION, "salt", "baseline", LOSS)
    assert found.seeds == () and found.summary(STEPS) == "-"
    assert found.told == (
        "seed 1: baseline: valid/loss is not finite at step 10",
        "seed 2: baseline: no valid/loss at step 10",
        "seed 3: salt: no valid/loss in its log",
    )


def test_of_accuracies_more_is_better() -> None:
    results = [
        run(kind, 1, {"valid/accuracy": {0: 0.1, 5: middle, 10: 0.5}}) for kind, middle in (("baseline", 0.3), ("salt", 0.6))
    ]
    found = crossings(results, lambda _: PREPARATION, "salt", "baseline", "valid/accuracy")
    assert found.seeds[0].step == 5


def test_shares_that_no_log_tells_are_not_known() -> None:
    salt = run("salt", 1, falling(9.0, 3.0), flops=False)
    existed = replace(PREPARATION, teacher_training=UNKNOWN)
    (one,) = crossings([BASELINE, salt], lambda _: existed, "salt", "baseline", LOSS).seeds
    assert one.shares[STEPS] == 0.2 and one.shares[Scale("seconds", "existed")] == 0.2
    assert one.shares[Scale("flops", "existed")] is None and one.shares[Scale("seconds", "trained")] is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 9), min_size=6, max_size=6), st.lists(st.floats(0, 9), min_size=6, max_size=6))
def test_one_seed_crosses_where_the_report_of_runs_says_so(own: list[float], other: list[float]) -> None:
    """The slow twin: the first evaluation, one after the other, that is below the other's last one."""
    salt, baseline = run("salt", 1, falling(*own)), run("baseline", 1, falling(*other))
    (one,) = crossings([salt, baseline], lambda _: PREPARATION, "salt", "baseline", LOSS).seeds
    assert one.step == next((2 * number for number, value in enumerate(own) if value < other[-1]), None)
    assert salt.curve is not None and baseline.curve is not None
    arm, against = arms_of([("salt", salt.curve), ("baseline", baseline.curve)])
    shares = passing(arm, against, LOSS).shares
    assert (shares is None) == (one.step is None) and (shares is None or shares["steps"] == one.shares[STEPS])


# --- equal steps, FLOPs, seconds --------------------------------------------------------------------------------------


def test_two_curves_are_compared_where_the_shorter_one_ends() -> None:
    """A line from 10 down to 0 in 10 steps; the arm falls twice as fast, in 4 steps. In seconds its steps are twice as long."""
    baseline = run("baseline", 1, {LOSS: {step: 10.0 - step for step in (0, 5, 10)}})
    salt = run("salt", 1, {LOSS: {step: 10.0 - 2 * step for step in (0, 4)}}, steps=4, seconds=4.0)
    results = [baseline, salt]

    def at(scale: Scale) -> tuple[float, float, float]:
        (one,) = matched(results, lambda _: PREPARATION, "salt", "baseline", LOSS, scale).seeds
        return one.position, one.arm, one.against

    assert at(STEPS) == pytest.approx((4, 2.0, 6.0))
    assert at(Scale("seconds", "existed")) == pytest.approx((16, 2.0, 2.0))
    assert at(Scale("flops", "existed")) == pytest.approx((4 * STUDENT_STEP, 2.0, 6.0))
    assert at(Scale("flops", "trained")) == pytest.approx((7 * STUDENT_STEP, 2.0, 3.0))
    assert at(Scale("seconds", "trained")) == pytest.approx((20, 10 - 2 * 3.5, 0.0))  # 6 seconds of training, 14 of 4 a step


def test_matched_tables_tell_signs_and_means() -> None:
    results = [replace(BASELINE, seed=seed) for seed in (1, 2, 3)]
    results += [run("salt", seed, falling(9.0, 7.0, 6.0, 5.0, 4.5, last)) for seed, last in ((1, 3.0), (2, 4.5))]
    results.append(run("salt", 3, {}))
    found = matched(results, lambda _: PREPARATION, "salt", "baseline", LOSS, STEPS)
    assert found.told == ("seed 3: salt: no valid/loss in its log",)
    rows = matched_rows([found])
    assert rows == [["salt", "baseline", LOSS, "steps", "2", "1 of 2", "3.7500", "4.0000", "-0.2500"]]
    assert len(MATCHED_HEADS) == len(rows[0])
    unknown = replace(PREPARATION, teacher_training=UNKNOWN)
    none = matched(results[:1] + results[3:4], lambda _: unknown, "salt", "baseline", LOSS, Scale("flops", "trained"))
    assert none.told == ("seed 1: salt: FLOPs, teacher trained for this run are not known",)
    assert matched_rows([none])[0][4:] == ["0", "0 of 0", "-", "-", "-"]


def test_a_teacher_that_costs_more_than_the_other_run_leaves_nothing_to_compare() -> None:
    dear = replace(PREPARATION, teacher_training=Spent(0.0, 21.0))
    results = [BASELINE, run("salt", 1, falling(9.0, 3.0))]
    found = matched(results, lambda _: dear, "salt", "baseline", LOSS, Scale("seconds", "trained"))
    assert found.told == ("seed 1: one run ends before the other's first evaluation, by seconds, teacher trained for this run",)


def test_the_scales_are_steps_and_two_units_under_three_accounts() -> None:
    assert [str(scale) for scale in SCALES] == [
        "steps", "FLOPs, teacher existed", "FLOPs, teacher trained for this run", "FLOPs, teacher shared by several runs",
        "seconds, teacher existed", "seconds, teacher trained for this run", "seconds, teacher shared by several runs",
    ]  # fmt: skip
    assert TEACHER_STEP * 9 == STUDENT_STEP and np.isfinite(BASELINE.seed)


# --- student and teacher ----------------------------------------------------------------------------------------------


def test_a_student_passes_its_teacher_and_a_baseline_is_held_against_the_same_one() -> None:
    def accuracies(*values: float, teacher: float | None = None) -> dict[str, dict[int, float]]:
        of_student = {"valid/prose/accuracy": {5 * number: value for number, value in enumerate(values)}}
        return of_student | ({} if teacher is None else {"valid/prose/teacher_accuracy": {0: teacher, 5: teacher}})

    results = [
        run("baseline", 1, accuracies(0.1, 0.2, 0.25)),
        run("baseline", 2, accuracies(0.1, 0.2, 0.3)),
        run("salt", 1, accuracies(0.1, 0.3, 0.35, teacher=0.25)),
        run("salt", 2, accuracies(0.1, 0.2, 0.3, teacher=0.22)),
        run("baseline", 3, accuracies(0.1, 0.2, 0.3)),
        run("salt", 3, {}, logged=False, state="waiting"),
    ]
    found = teacher_crossovers(results)
    assert [(one.label, one.seed, one.teacher_accuracy, one.step) for one in found] == [
        ("baseline", 1, 0.25, None), ("baseline", 2, 0.22, 10), ("salt", 1, 0.25, 5), ("salt", 2, 0.22, 10),
        ("baseline", 3, 0.25, 10),
    ]  # fmt: skip
    assert crossover_rows(found)[0] == ["baseline", "1", "valid/prose", "25.00%", "not reached"]
    assert len(CROSSOVER_HEADS) == len(crossover_rows(found)[0])
    assert teacher_crossovers(results[:2]) == []

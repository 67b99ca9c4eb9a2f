"""Break-even: what a teacher may cost, on curves with known answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_salt.study.analysis.crossings import crossings
from megatron_salt.study.analysis.economics import (
    BREAK_EVEN_HEADS,
    SAVING_HEADS,
    Economics,
    break_even_rows,
    economics,
    saving_rows,
)
from megatron_salt.study.analysis.ledger import UNKNOWN, Payer, Preparation, Spent
from megatron_salt.study.results import Kind, RunResult
from tests.study.analysis.runs import LOSS, STUDENT_STEP, TEACHER, falling, run

PREPARATION = Preparation(
    teacher=TEACHER, teacher_training=Spent(3 * STUDENT_STEP, 6.0), scoring=Spent(STUDENT_STEP, 2.0), runs_that_share=3,
)  # fmt: skip


def two(kind: Kind, *steps: int | None, seconds: float = 2.0) -> list[RunResult]:
    """Baselines of 10 steps, and for each seed a run that passes its baseline at this step."""
    results = [run("baseline", seed, falling(9.0, 8.0, 7.0, 6.0, 5.0, 4.0)) for seed, _ in enumerate(steps, 1)]
    for seed, step in enumerate(steps, 1):
        figures = {LOSS: {at: 3.0 if step is not None and at >= step else 5.0 for at in range(0, 11, 2)}}
        results.append(run(kind, seed, figures, seconds=seconds))
    return results


def of(results: list[RunResult], kind: Kind, unit: Payer = "flops", preparation: Preparation = PREPARATION) -> Economics:
    found = economics(crossings(results, lambda _: preparation, kind, "baseline", LOSS), lambda _: preparation, unit)
    assert found is not None
    return found


def test_what_a_run_saves_is_what_its_teacher_may_cost() -> None:
    """Passed at step 6 of 10, so 4 steps of the student are saved. A step of the teacher, forward and backward, takes a third of one: they
    buy 12 steps of the teacher, 1.2 times the student's tokens. Its training costs 3 steps, so it pays in one run."""
    (seed,) = of(two("salt", 6), "salt").seeds
    assert seed.saved == pytest.approx(4 * STUDENT_STEP) and seed.share == pytest.approx(0.4)
    assert seed.token_share == pytest.approx(1.2) and seed.runs_to_share == 1
    (by_time,) = of(two("salt", 6, seconds=3.0), "salt", "seconds").seeds
    assert by_time.saved == pytest.approx(20 - 18) and by_time.share == pytest.approx(0.1)
    assert by_time.token_share is None and by_time.runs_to_share == 3


def test_scores_are_paid_by_each_run_or_shared_with_the_teacher() -> None:
    """4 steps saved, scores cost one: 3 are left for the training, which costs 3. Shared by M: (3 + 1) / M <= 4."""
    found = of(two("salt_ds", 6), "salt_ds")
    assert found.scoring_share == pytest.approx(0.1)
    assert found.seeds[0].share == pytest.approx(0.3) and found.seeds[0].runs_to_share == 1
    dear = replace(PREPARATION, scoring=Spent(9 * STUDENT_STEP, 0.0))
    (seed,) = of(two("salt_ds", 6), "salt_ds", preparation=dear).seeds
    assert seed.share == pytest.approx(-0.5) and seed.token_share is None and seed.runs_to_share == 3  # (3 + 9) / 3 <= 4


def test_the_answer_in_a_sentence() -> None:
    assert str(of(two("salt", 6, 8, None), "salt")) == (
        "salt, by FLOPs: 2 of 3 seeds pass baseline's final valid/loss; in those, your teacher's training may cost at most 20.0% to 40.0% "
        "of a baseline run's FLOPs, which trains it on 60.0% to 120.0% of the student's tokens; it must be shared by at least 1 to 2 runs"
    )
    assert str(of(two("salt", None), "salt")) == (
        "salt, by FLOPs: 0 of 1 seeds pass baseline's final valid/loss: no teacher pays, however cheap"
    )
    slow = of(two("salt", 8, seconds=4.0), "salt", "seconds")
    assert str(slow).endswith("1 of 1 seeds pass baseline's final valid/loss: even so no teacher pays, however cheap")
    assert slow.seeds[0].runs_to_share is None
    unknown = replace(PREPARATION, teacher_training=UNKNOWN)
    assert str(of(two("salt", 6), "salt", preparation=unknown)).endswith("on 120.0% of the student's tokens")
    assert str(of(two("salt", 6), "salt")).endswith("of the student's tokens; it pays in a single run")
    untold = two("salt", 6)
    assert "is not known" in str(of([*untold[:1], run("salt", 1, falling(3.0, 3.0), flops=False)], "salt"))


def test_an_arm_without_a_teacher_has_no_price_of_one() -> None:
    found = crossings(two("longer", 6), lambda _: PREPARATION, "longer", "baseline", LOSS)
    assert economics(found, lambda _: PREPARATION, "flops") is None


def test_tables_have_a_row_for_each_seed() -> None:
    results = two("salt", 6, None)
    found = crossings(results, lambda _: PREPARATION, "salt", "baseline", LOSS)
    rows = saving_rows([found])
    assert rows[0] == ["salt", "baseline", LOSS, "1", "40.0%", "40.0%", "10.0%", "30.0%", "40.0%", "10.0%", "30.0%"]
    assert rows[1][4:] == ["not reached"] * 7 and len(SAVING_HEADS) == len(rows[0])
    table = break_even_rows([of(results, "salt")])
    assert table[0] == ["salt", "baseline", "FLOPs", "1", "8.294e+04", "40.0%", "120.0%", "1", "0.0%"]
    assert table[1][4:] == ["not reached", "not reached", "-", "-", "0.0%"] and len(BREAK_EVEN_HEADS) == len(table[0])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.floats(0, 20), st.floats(0, 9))
def test_a_teacher_shared_by_so_many_runs_pays_and_by_one_fewer_does_not(at: int, training: float, scoring: float) -> None:
    """Break-even against the account "shared": its share is at most 1 just from that number of runs on."""
    preparation = replace(
        PREPARATION, teacher_training=Spent(training * STUDENT_STEP, 0.0), scoring=Spent(scoring * STUDENT_STEP, 0.0)
    )
    results = two("salt_ds", 2 * at)
    (seed,) = of(results, "salt_ds", preparation=preparation).seeds
    cost = 2 * at + (training + scoring) / (seed.runs_to_share or 1)  # in steps of the student
    if seed.runs_to_share is None:
        assert at == 5
        return
    assert cost <= 10 + 1e-6
    if seed.runs_to_share > 1:
        assert 2 * at + (training + scoring) / (seed.runs_to_share - 1) > 10 - 1e-6

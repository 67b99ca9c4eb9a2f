"""Hours and economics of a planned run, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_salt.planner.time.payback import runs_to_share
from megatron_salt.planner.time.whole_run import WholeRun, whole_run_lines

RUN = WholeRun(
    steps=1000, ranks=10, stage1=((200, 1.5),), stage2_step=1.0, scoring=80.0, scored_share=0.25, teacher=150.0,
    teacher_token=1e-9, tokens=10**12,
)  # fmt: skip
"""A baseline of 1000 GPU-hours. SALT takes 1100, and its scores 20 of 80."""


def test_hours_are_those_of_both_stages():
    assert RUN.baseline == 1000 and RUN.salt == 1100 and RUN.scores == 20
    assert RUN.until(100) == 150 and RUN.until(700) == 800


@pytest.mark.parametrize("preparation, step", [(0.0, 900.0), (20.0, 880.0), (170.0, 730.0), (850.0, 100.0), (1001.0, None)])
def test_break_even_is_where_both_have_cost_the_same(preparation, step):
    assert RUN.break_even_step(preparation) == step
    if step is not None:
        assert RUN.until(step) + preparation == pytest.approx(RUN.baseline)


def test_a_stage_1_may_have_two_parts():
    both = replace(RUN, stage1=((100, 1.8), (200, 1.2)))
    assert both.salt == 180 + 240 + 700 and both.until(50) == 90 and both.until(150) == 240 and both.until(400) == 520
    for step in (50, 100, 150, 300, 400):
        assert both.break_even_step(both.baseline - both.until(step)) == pytest.approx(step)
    assert "300 steps of stage 1" in whole_run_lines(both, reached_at=0.7)[1]


def test_the_lines_say_what_the_teacher_may_cost():
    lines = whole_run_lines(RUN, reached_at=0.7)
    assert lines[0] == "baseline, 1000 steps: about 100 h on 10 GPUs, 1,000 GPU-hours"
    assert lines[1] == "this run, 1000 steps: about 110 h on 10 GPUs, 1,100 GPU-hours (+10.0%; 200 steps of stage 1)"
    assert "of a share of 0.25: 20, which saves 60 (6.0% of the baseline)" in lines[2]
    assert lines[3].endswith("by step 880 of 1000 (88.0%)") and lines[4].endswith("by step 730 of 1000 (73.0%)")
    # 1000 - 800 saved, 20 of them for the scores
    assert "may cost 180 GPU-hours (18.0% of the baseline), about 1.8e+11 tokens (18.0% of the student's)" in lines[5]
    assert lines[5].endswith("it must be shared by at least 1 run")
    assert whole_run_lines(RUN, reached_at=0.9)[5].endswith("it saves nothing: no teacher pays, however cheap")


def test_runs_that_share_a_teacher_pay_for_it_together():
    assert [runs_to_share(100.0, shared) for shared in (0.0, 100.0, 101.0, 250.0)] == [1, 1, 2, 3]
    assert runs_to_share(0.0, 1.0) is None

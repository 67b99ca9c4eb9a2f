"""SALT's switch as pure functions: in which stage a start begins, when a crossover counts, where stage 2 begins. Without ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_salt.checkpoint.run_state import RunState, SaltState
from megatron_salt.config import ModelConfig, SaltConfig
from megatron_salt.salt.schedule import Schedule
from megatron_salt.salt.stage1 import Stage1, data_of_stage2, decide_salt, resumes_in_stage2, schedule_of, starts_in_stage2
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint

FLAGS = SaltConfig(teacher_load="teacher", kd_steps=10, kd_transition="linear", kd_transition_steps=2, kd_stop="crossover")
SCHEDULE = Schedule.of(FLAGS)
SALT = SaltState(stage1_end=10, schedule=SCHEDULE.facts(), teacher="sha256:aaaa", teacher_directory="teacher")
FIGURES = {"loss": 3.0, "accuracy": 0.4}


def teacher(fingerprint: str = "sha256:aaaa") -> TeacherCheckpoint:
    return TeacherCheckpoint(
        directory=Path("teacher"), model=ModelConfig(), vocabulary_size=10, seq_length=8, tokenizer_fingerprint="", step=3,
        fingerprint=fingerprint, lengths=(8,), losses=(1.0,), dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize(
    "step, due, changes, stage",
    [
        (9, False, {}, 1),
        (10, False, {}, 2),
        (10, True, {}, 1),  # the evaluation that is due belongs to stage 1
        (10, True, dict(evaluates=False), 2),
        (10, True, dict(schedule=None, teacher=None), 2),  # the flags no longer name the teacher
        (10, True, dict(teacher=None), 2),
        (10, True, dict(teacher=teacher("sha256:bbbb")), 2),
        (11, True, {}, 2),
    ],
)
def test_a_start_at_the_end_of_stage_1_belongs_to_it_while_its_evaluation_is_due(
    step: int, due: bool, changes: dict[str, Any], stage: int
) -> None:
    flags: dict[str, Any] = dict(schedule=SCHEDULE, teacher=teacher(), evaluates=True) | changes
    progress = RunState(step=step, evaluation_due=due, salt=SALT)
    assert starts_in_stage2(SALT, progress, **flags) == (stage == 2)


@pytest.mark.parametrize(
    "saved, evaluates, needs_none",
    [
        (RunState(step=12), True, False),  # a run without a stage 1 says nothing about a teacher
        (RunState(step=9, salt=SALT), True, False),
        (RunState(step=10, salt=SALT), True, True),
        (RunState(step=10, salt=SALT, evaluation_due=True), True, False),
        (RunState(step=10, salt=SALT, evaluation_due=True), False, True),
    ],
)
def test_a_checkpoint_in_stage_2_needs_no_teacher(saved: RunState, evaluates: bool, needs_none: bool) -> None:
    assert resumes_in_stage2(saved, evaluates) == needs_none


def test_a_crossover_counts_once_and_moves_the_end_of_stage_1() -> None:
    stage1 = Stage1(None, replace(SCHEDULE, kd_stop_margin=0.05))
    before = RunState(step=4, salt=replace(SALT, teacher_held_out=FIGURES))
    assert stage1.accuracy_to_pass(before) == pytest.approx(0.45) and stage1.may_cross_over(before)
    after = stage1.after_crossover(before)
    assert after.salt == replace(SALT, teacher_held_out=FIGURES, crossover=4, stage1_end=6)
    assert not stage1.may_cross_over(after) and not stage1.may_cross_over(replace(before, step=0))
    assert [stage1.contains(step, after) for step in (6, 7)] == [True, False]
    weights = [stage1.weights(step, after).soft_labels for step in (6, 7)]
    assert weights[0] is not None and weights[0] > 0 and weights[1] is None
    assert not Stage1(None, replace(SCHEDULE, kd_stop="steps")).may_cross_over(before)


def test_the_flags_decide_the_state_of_a_new_run_and_name_the_teacher_by_its_contents() -> None:
    assert decide_salt(FLAGS, None, teacher()) == (SALT, ())
    assert decide_salt(SaltConfig(), None, None) == (None, ()) and schedule_of(SaltConfig()) is None


def test_without_a_selection_the_data_know_nothing_of_stage_2() -> None:
    batches: Any = object()
    progress = RunState(step=10, position=80, salt=SALT)
    assert data_of_stage2(batches, None, progress) == (batches, progress)

"""Where a resumed run stands between its stages: every row of what a checkpoint may say and the flags may ask. Without ranks."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from typing import Any

import pytest

from megatron_salt.checkpoint.run_state import RunState, SaltState
from megatron_salt.config import SaltConfig
from megatron_salt.config.teaching import Gate, parse_gate
from megatron_salt.errors import UserError
from megatron_salt.salt.schedule import Schedule, salt_at_start

FLAGS = SaltConfig(teacher_load="teacher", kd_steps=100, kd_transition="linear", kd_transition_steps=10, kd_stop="crossover")
SCHEDULE = Schedule.of(FLAGS)
SALT = SaltState(stage1_end=100, schedule=SCHEDULE.facts(), teacher="sha256:aaaa", teacher_directory="teacher")
CROSSED = replace(SALT, crossover=40, stage1_end=50, teacher_held_out={"loss": 3.0, "accuracy": 0.4})


def resumed(step: int, salt: SaltState | None) -> RunState:
    """What a checkpoint of that step says, by way of its file."""
    saved = None if salt is None else SaltState(**json.loads(json.dumps(asdict(salt))))
    return RunState(step=step, consumed_samples=8 * step, salt=saved)


def taken(
    found: RunState | None, teacher: str | None = "sha256:aaaa", override: bool = False, **flags: Any
) -> tuple[SaltState | None, tuple[dict[str, Any], ...]]:
    """With --teacher-load and these changes to the flags."""
    return salt_at_start(found, Schedule.of(replace(FLAGS, **flags)), teacher, "moved", override)


def test_a_new_run_is_in_stage_1_with_a_teacher_and_plain_without() -> None:
    assert taken(None) == (replace(SALT, teacher_directory="moved"), ())
    assert salt_at_start(None, None, None, None, False) == (None, ())


@pytest.mark.parametrize("salt", [SALT, CROSSED])
@pytest.mark.parametrize("step", [1, 48, 49])
def test_inside_stage_1_the_same_teacher_and_flags_go_on_where_the_checkpoint_was(salt: SaltState, step: int) -> None:
    """A crossover is a fact: it is not asked for again. A copy of the teacher is the same teacher."""
    assert taken(resumed(step, salt)) == (salt, ())
    assert taken(resumed(step, salt), override=True) == (salt, ())


@pytest.mark.parametrize("step, salt", [(100, SALT), (101, SALT), (50, CROSSED), (99, CROSSED)])
def test_from_the_last_step_of_stage_1_on_no_teacher_is_needed_and_none_used(
    step: int, salt: SaltState, caplog: pytest.LogCaptureFixture
) -> None:
    assert salt_at_start(resumed(step, salt), None, None, None, False) == (salt, ())
    assert caplog.messages == []
    with caplog.at_level(logging.INFO):
        for teacher in (None, "sha256:bbbb"):
            assert taken(resumed(step, salt), teacher, kd_steps=1000, kd_weight=0.1) == (salt, ())
            assert taken(resumed(step, salt), teacher, override=True, kd_steps=1000) == (salt, ())
    assert len(caplog.messages) == 4
    assert f"in stage 2, since step {salt.stage1_end + 1}: --teacher-load and the kd flags are not used" in caplog.messages[0]


def test_a_run_without_a_teacher_gets_none_later() -> None:
    assert salt_at_start(resumed(7, None), None, None, None, False) == (None, ())
    with pytest.raises(
        UserError, match="without a teacher up to step 7, and --teacher-load moved .*--finetune takes the weights alone"
    ):
        taken(resumed(7, None))


def test_inside_stage_1_another_teacher_or_none_is_refused_naming_both() -> None:
    with pytest.raises(
        UserError, match=r"step 99 is in stage 1.*sha256:aaaa \(then in teacher\).*--teacher-load moved is sha256:bbbb"
    ):
        taken(resumed(99, SALT), "sha256:bbbb")
    with pytest.raises(
        UserError, match=r"step 99 .* ends after step 100.*sha256:aaaa \(then in teacher\); give --teacher-load"
    ):
        salt_at_start(resumed(99, SALT), None, None, None, False)
    with pytest.raises(UserError, match=r"--teacher-load moved was not read: give the iter_\* directory of step 99 to --load"):
        taken(resumed(99, SALT), None)


@pytest.mark.parametrize(
    "change, sides",
    [
        (dict(kd_steps=120), ["--kd-steps is 100 there and 120 here"]),
        (dict(kd_weight=0.5, kd_teacher_temperature=1.0),
         ["--kd-weight is 0.667 there and 0.5 here", "--kd-teacher-temperature is 0.25 there and 1.0 here"]),
        (dict(kd_transition="step", kd_transition_steps=0),
         ["--kd-transition is linear there and step here", "--kd-transition-steps is 10 there and 0 here"]),
        (dict(kd_stop="steps"), ["--kd-stop is crossover there and steps here"]),
        (dict(kd_gate="rank:5"), ["--kd-gate is none there and rank:5 here"]),
        (dict(kd_weight_schedule=("1:0.5", "9:0.1"), kd_temperature_schedule=("1:1",)),
         ["--kd-weight-schedule is not given there and 1:0.5 9:0.1 here", "--kd-temperature-schedule is not given there and 1:1 here"]),
        (dict(kd_stop_margin=0.1), ["--kd-stop-margin is 0.0 there and 0.1 here"]),
        (dict(kd_stop="steps", guide="both", let_steps=5),
         ["--kd-stop is crossover there and steps here", "--guide is soft-labels there and both here",
          "--let-steps is None there and 5 here"]),
    ],
)  # fmt: skip
def test_another_schedule_is_refused_flag_by_flag_unless_it_is_meant(change: dict[str, Any], sides: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        taken(resumed(30, SALT), **change)
    assert all(side in str(caught.value) for side in sides) and "--override-kd-schedule" in str(caught.value)
    assert str(caught.value).count(" there and ") == len(sides)
    salt, events = taken(resumed(30, SALT), override=True, **change)
    here = Schedule.of(replace(FLAGS, **change)).facts()
    assert salt == replace(SALT, schedule=here, stage1_end=here["kd_steps"])
    assert events == ({"event": "kd_schedule", "step": 30, "from": SALT.schedule, "to": here},)
    assert json.loads(json.dumps(events[0])) == events[0]


def test_another_spelling_of_the_same_gate_and_schedules_is_no_other_schedule() -> None:
    spelled: tuple[dict[str, Any], ...] = (
        dict(kd_gate="rank:5", kd_weight_schedule=("1:0", "9:0.05"), kd_temperature_schedule=("1:1", "2:0.001")),
        dict(kd_gate="rank:05", kd_weight_schedule=("01:-0.0", "9:.050"), kd_temperature_schedule=("1:1.0", "2:1E-3")),
    )
    one, other = (Schedule.of(replace(FLAGS, **given)) for given in spelled)
    assert one == other and (one.kd_gate, one.kd_weight_schedule) == ("rank:5", "1:0 9:0.05")
    saved = replace(SALT, schedule=one.facts())
    assert taken(resumed(30, saved), **spelled[1]) == (saved, ())
    for bound in (0.1, 1e-30, 1e22, 2.0, 1 / 3):
        gate = Schedule.of(replace(FLAGS, kd_gate=f"entropy:{bound}")).kd_gate
        assert parse_gate(gate) == Gate("entropy", bound)


def test_a_gate_and_schedules_go_on_and_may_be_given_up() -> None:
    given: dict[str, Any] = dict(kd_gate="entropy:2", kd_weight_schedule=("1:0.5",))
    saved = replace(SALT, schedule=Schedule.of(replace(FLAGS, **given)).facts())
    assert taken(resumed(30, saved), **given) == (saved, ())
    with pytest.raises(
        UserError, match=r"--kd-gate is entropy:2 there and none here; --kd-weight-schedule is 1:0.5 there and not"
    ):
        taken(resumed(30, saved))
    assert taken(resumed(30, saved), override=True)[0] == SALT


@pytest.mark.parametrize(
    "step, salt, change, end",
    [
        (30, SALT, dict(kd_steps=60), 60),
        (80, SALT, dict(kd_steps=60), 80),  # what is done is done: stage 2 begins with the next step
        (45, CROSSED, dict(kd_steps=200), 50),
        (45, CROSSED, dict(kd_transition_steps=30), 70),
        (45, CROSSED, dict(kd_transition_steps=2), 45),
        (45, CROSSED, dict(kd_steps=48), 48),
        (45, CROSSED, dict(kd_stop="steps"), 100),  # nobody asks for a crossover any more
    ],
)
def test_a_changed_schedule_ends_stage_1_where_its_flags_say_and_never_in_the_past(
    step: int, salt: SaltState, change: dict[str, Any], end: int
) -> None:
    found, (event,) = taken(resumed(step, salt), override=True, **change)
    assert found is not None and found.stage1_end == end and event["step"] == step
    assert found.crossover == (None if change.get("kd_stop") == "steps" else salt.crossover)
    assert found.teacher_held_out == salt.teacher_held_out
    assert taken(resumed(step, found), **change) == (found, ())  # the change holds from then on, without the flag


SELECTED = SaltConfig(stage1_selection="chosen.npy", kd_steps=100, kd_weight=0.0)
ALONE = SaltState(stage1_end=100, schedule=Schedule.of(SELECTED).facts(), teacher=None, teacher_directory=None)


def test_a_stage_1_with_a_selection_alone_starts_and_goes_on_without_a_teacher() -> None:
    schedule = Schedule.of(SELECTED)
    assert salt_at_start(None, schedule, None, None, False) == (ALONE, ())
    for step in (1, 99, 100, 101):
        assert salt_at_start(resumed(step, ALONE), schedule, None, None, False) == (ALONE, ())
    assert salt_at_start(resumed(100, ALONE), None, None, None, False) == (ALONE, ())


def test_a_stage_1_neither_gets_nor_loses_its_teacher_on_the_way() -> None:
    schedule = Schedule.of(SELECTED)
    for flags, found, told in [
        (
            (schedule, "sha256:aaaa", "moved"),
            ALONE,
            "step 99 is in a stage 1 without a teacher, and --teacher-load moved asks for one",
        ),
        (
            (schedule, None, None),
            SALT,
            r"step 99 is in stage 1.* its teacher, sha256:aaaa \(then in teacher\); give --teacher-load",
        ),
        (
            (None, None, None),
            ALONE,
            "step 99 is in stage 1, which ends after step 100: give --stage1-selection and the kd flags",
        ),
    ]:
        with pytest.raises(UserError, match=told):
            salt_at_start(resumed(99, found), *flags, False)
    with pytest.raises(UserError, match="trained without a stage 1 up to step 7, and --kd-steps 100 asks for one"):
        salt_at_start(resumed(7, None), schedule, None, None, False)


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("step, stage, end_of_stage_1", [(49, 1, False), (50, 2, True), (51, 2, False)])
def test_an_evaluation_that_is_due_at_the_end_of_stage_1_still_belongs_to_it(
    step: int, stage: int, end_of_stage_1: bool, due: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With the teacher where flags name it, and it is not said then that they are not used; they may be gone with the stage."""
    assert CROSSED.resumes_in(step, due) == (1 if due and end_of_stage_1 else stage)
    found = replace(resumed(step, CROSSED), evaluation_due=due)
    with caplog.at_level(logging.INFO):
        assert taken(found) == (CROSSED, ())
    assert bool(caplog.messages) == (stage == 2 and not (due and end_of_stage_1))
    if stage == 2:
        assert salt_at_start(found, None, None, None, False) == (CROSSED, ())

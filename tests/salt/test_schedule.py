"""The teacher's weight: full, fading, none; and the end of stage 1, a pure function of flags and crossover."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from megatron_salt.config import SaltConfig
from megatron_salt.salt.schedule import Schedule, checked_temperatures, is_tempered, lowest_temperature


def schedule(steps: int = 10, transition: str = "step", fade: int = 0, weight: float = 0.6, **others: Any) -> Schedule:
    return Schedule.of(
        SaltConfig(
            teacher_load="t",
            kd_steps=steps,
            kd_transition=transition,
            kd_transition_steps=fade,  # type: ignore[arg-type]
            kd_weight=weight,
            **others,
        )
    )


def weights(schedule: Schedule, end: int, beyond: int = 3) -> list[float]:
    return [schedule.at(step, end) for step in range(1, end + beyond + 1)]


FADES = [("step", 0), ("linear", 1), ("linear", 4), ("linear", 10), ("ratio", 1), ("ratio", 4), ("ratio", 10)]


@pytest.mark.parametrize("transition, fade, expected", [
    ("step", 0, [0.6, 0.6, 0.6, 0.6, 0.6, 0.0, 0.0]),
    ("linear", 2, [0.6, 0.6, 0.6, 0.4, 0.2, 0.0, 0.0]),
    ("ratio", 2, [0.6, 0.6, 0.6, 1 / 2, 1 / 3, 0.0, 0.0]),  # w / (1 - w) = 1.5, 1.0, 0.5
    ("linear", 5, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
])  # fmt: skip
def test_weights_by_hand(transition, fade, expected):
    assert weights(schedule(5, transition, fade), 5, beyond=2) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("transition, fade", FADES)
def test_full_then_falling_then_none(transition, fade):
    full, fading, alone = 10 - fade, fade, 3
    found = weights(schedule(10, transition, fade), 10)
    assert found[:full] == [0.6] * full and found[full + fading :] == [0.0] * alone
    falling = [0.6, *found[full : full + fading], 0.0]
    assert all(after < before for before, after in itertools.pairwise(falling))


@pytest.mark.parametrize("fade", [1, 3, 10])
def test_fades_are_straight_lines_down_to_the_first_step_alone(fade):
    """Linear in w, or in w / (1 - w): from the last step at full weight to the first without a teacher all differences are one."""
    around = slice(10 - fade - 1 if fade < 10 else 0, 11)
    linear = weights(schedule(10, "linear", fade), 10)[around]
    ratio = [w / (1 - w) for w in weights(schedule(10, "ratio", fade), 10)[around]]
    for line in (linear, ratio):
        drops = [before - after for before, after in itertools.pairwise(line)]
        assert drops == pytest.approx([drops[0]] * len(drops)) and line[-1] == 0.0


@pytest.mark.parametrize("transition, fade", FADES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.999])
def test_a_weight_is_a_share(transition, fade, weight):
    assert all(0.0 <= w <= weight for w in weights(schedule(10, transition, fade, weight), 10))


@pytest.mark.parametrize("transition, fade", FADES)
def test_an_earlier_end_moves_the_fade_and_leaves_its_shape(transition, fade):
    """Stage 1 that ends at E is the end of any longer one."""
    long = schedule(100, transition, fade)
    assert (
        weights(long, 20)[-fade - 5 :]
        == weights(long, 60)[-fade - 5 :]
        == weights(schedule(20, transition, fade), 20)[-fade - 5 :]
    )


@pytest.mark.parametrize("transition, fade", FADES)
def test_after_a_crossover_the_transition_still_takes_place_inside_kd_steps(transition, fade):
    plan = schedule(30, transition, fade, kd_stop="crossover")
    for crossover in range(1, 31):
        end = plan.stage1_end_after(crossover)
        assert end == min(30, crossover + fade)
        assert plan.at(crossover + 1, end) < 0.6 or crossover + fade > 30
        # the steps that are done stay what they were
        assert [plan.at(step, end) for step in range(1, crossover + 1)] == [
            plan.at(step, 30) for step in range(1, crossover + 1)
        ]


def test_weights_of_guidance_by_hand():
    linear = schedule(3, guide="both", let_steps=4, let_weight=0.1)
    assert [linear.let_weight_at(step) for step in range(1, 7)] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0])
    at_once = schedule(3, guide="both", let_steps=4, let_weight=0.1, let_decay="step")
    assert [at_once.let_weight_at(step) for step in range(1, 7)] == [0.1] * 4 + [0.0] * 2
    assert {schedule(3).let_weight_at(step) for step in (1, 3)} == {0.0}


def test_stage_1_lasts_while_the_teacher_teaches_in_any_way():
    """Soft labels fade to their own end."""
    longer, shorter = (schedule(3, "linear", 1, guide="both", let_steps=steps) for steps in (5, 2))
    assert (longer.stage1_steps, shorter.stage1_steps) == (5, 3)
    assert weights(longer, 5) == [0.6, 0.6, 0.3, *[0.0] * 5] and weights(shorter, 3) == [0.6, 0.6, 0.3, *[0.0] * 3]
    alone = Schedule.of(SaltConfig(teacher_load="t", guide="hidden", let_steps=5))
    assert alone.stage1_steps == 5 and weights(alone, 5) == [0.0] * 8


def test_the_teacher_stays_to_the_end_of_stage_1_whatever_its_weight():
    for weight in (0.0, 0.6, 1.0):
        plan = schedule(7, weight=weight)
        assert [step for step in range(1, 12) if plan.in_stage1(step, 7)] == list(range(1, 8))


def test_stage_1_beyond_the_run_is_teaching_to_the_end():
    assert {schedule(1000).at(step, 1000) for step in range(1, 50)} == {0.6}


def test_facts_survive_json_and_hold_what_shapes_the_mathematics():
    plan = schedule(10, "ratio", 4, kd_teacher_temperature=0.5, kd_stop="crossover", kd_stop_margin=-0.01)
    facts = json.loads(json.dumps(plan.facts()))
    assert Schedule.from_facts(facts) == plan
    assert facts == dict(kd_steps=10, kd_weight=0.6, kd_teacher_temperature=0.5, kd_transition="ratio", kd_transition_steps=4,
                         kd_stop="crossover", kd_stop_margin=-0.01)  # fmt: skip
    assert schedule(10, teacher_micro_batch_size=4) == schedule(10)
    guided = schedule(10, guide="both", let_steps=4)
    assert Schedule.from_facts(json.loads(json.dumps(guided.facts()))) == guided
    added = guided.facts().items() - schedule(10).facts().items()
    assert dict(added) == dict(guide="both", let_weight=0.1, let_layer=3, let_steps=4, let_decay="linear")


def test_a_gate_and_schedules_are_recorded_where_they_are_given():
    more = dict(kd_gate="rank:5", kd_weight_schedule=("1:0.9", "5:0.1"), kd_temperature_schedule=("2:1.0",))
    plan = schedule(10, **more)
    facts = json.loads(json.dumps(plan.facts()))
    assert Schedule.from_facts(facts) == plan
    assert facts.items() - schedule(10, weight=SaltConfig.kd_weight).facts().items() == {
        ("kd_gate", "rank:5"), ("kd_weight_schedule", "1:0.9 5:0.1"), ("kd_temperature_schedule", "2:1"),
    }  # fmt: skip


def test_a_value_that_a_schedule_replaces_makes_no_other_schedule():
    lists = dict(kd_weight_schedule=("1:0.8",), kd_temperature_schedule=("1:0.5",))
    assert schedule(10, weight=0.1, kd_teacher_temperature=2.0, **lists) == schedule(10, **lists)
    assert schedule(10, weight=0.1) != schedule(10)


def test_scheduled_values_by_hand():
    plan = schedule(10, kd_weight_schedule=("2:0.8", "4:0.4", "5:0.6", "8:0.0"), kd_temperature_schedule=("1:0.25", "5:1.25"))
    found = weights(plan, 10)
    assert found == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-15)
    assert [plan.temperature_at(step) for step in range(1, 8)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.25, 1.25])
    points = {2: 0.8, 4: 0.4, 5: 0.6, 8: 0.0}
    assert {step: plan.at(step, 10) for step in points} == points  # bit for bit at its own steps
    beyond = schedule(10**9, kd_weight_schedule=("1:0.1", "1000000000:0.7"))
    assert beyond.at(1, 10**9) == 0.1 and beyond.at(10**9, 10**9) == 0.7


@pytest.mark.parametrize("transition, fade", FADES)
def test_a_constant_schedule_is_the_one_value_bit_for_bit(transition, fade):
    for points in (("1:0.6",), ("3:0.6", "4:0.6", "9:0.6")):
        plan = schedule(
            10, transition, fade, weight=0.1, kd_weight_schedule=points, kd_temperature_schedule=("2:0.25", "7:0.25")
        )
        assert weights(plan, 10) == weights(schedule(10, transition, fade), 10)
        assert {plan.temperature_at(step) for step in range(1, 12)} == {0.25}


def test_a_transition_fades_from_the_scheduled_weight():
    """Oracle: the factors of the last two steps, by hand."""
    points = ("1:0.8", "5:0.4")
    linear, ratio = (schedule(5, transition, 2, kd_weight_schedule=points) for transition in ("linear", "ratio"))
    assert weights(linear, 5) == pytest.approx([0.8, 0.7, 0.6, 0.5 * 2 / 3, 0.4 / 3, 0, 0, 0])
    of_ratio = [0.5 / 0.5 * 2 / 3, 0.4 / 0.6 / 3]
    assert weights(ratio, 5) == pytest.approx([0.8, 0.7, 0.6, *(r / (1 + r) for r in of_ratio), 0, 0, 0])


def test_the_extremes_of_the_temperature():
    flags = dict(teacher_load="t", kd_steps=9)
    for points, lowest, tempered in [((), 0.25, True), (("1:2", "5:1"), 1.0, True), (("3:1", "5:1"), 1.0, False)]:
        config = SaltConfig(**flags, kd_temperature_schedule=points)
        assert (lowest_temperature(config), is_tempered(config)) == (lowest, tempered)


def test_a_ratio_fades_from_the_schedule_whatever_the_weight_in_its_place():
    plan = Schedule.of(SaltConfig(teacher_load="t", kd_steps=4, kd_transition="ratio", kd_transition_steps=1, kd_weight=1.0,
                                  kd_weight_schedule=("1:0.5",)))  # fmt: skip
    assert [plan.at(step, 4) for step in range(1, 6)] == pytest.approx([0.5, 0.5, 0.5, 1 / 3, 0.0])


@pytest.mark.parametrize("flags, temperatures", [
    (dict(), (0.25, 1.0)),
    (dict(kd_teacher_temperature=1.0), (1.0,)),
    (dict(kd_temperature_schedule=("1:0.5", "2:4", "3:2")), (0.5, 4.0, 1.0)),
])  # fmt: skip
def test_checks_look_at_the_ends_of_a_schedule_of_temperatures_and_at_1(flags, temperatures):
    assert checked_temperatures(SaltConfig(teacher_load="t", kd_steps=4, **flags)) == temperatures

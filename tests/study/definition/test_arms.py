"""The exact flags of each kind of arm."""

from __future__ import annotations

import pytest

from megatron_salt.errors import UserError
from megatron_salt.study.definition.arms import Inputs, arm_flags, build, overlaid, training_flops
from megatron_salt.study.definition.study import KINDS, Arm
from megatron_salt.study.results import Kind

BASE = {
    "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "make_vocab_size_divisible_by": 4},
    "training": {"seq_length": 4, "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 10},
}
SALT = {"kd_steps": 4, "kd_weight": 0.5, "stage2_data": "unseen", "kd_transition": "linear", "kd_transition_steps": 2}
GATE = {"kd_gate": "rank:3"}
"""`salt:` of the study has it too."""
STEP_FLOPS = 2 * 4 * 3 * (2 * (2 * (8 * 8 * 4 + 2 * 8 * 32) + 2 * 2 * 8 * 2) + 2 * 8 * 12)
"""Of BASE: 2 samples x 4 tokens x (forward + backward) x (2 layers x (projections, an MLP of width 4 h, attention) + head of 12 rows)"""
INPUTS = Inputs(teacher_load="teacher", stage1_selection="s.npy", teacher_flops=3.9 * STEP_FLOPS, vocabulary_size=10)


GUIDED = SALT | {"let_steps": 6, "let_layer": 1, "kd_stop_margin": 0.5, "teacher_max_dropped_mass": 0.5}


def flags(kind: Kind, setting=None, base=BASE, **own):
    return arm_flags(Arm(name="a", kind=kind, flags=own), SALT | GATE, setting or {}, base, 1, INPUTS)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("baseline", {}),
        ("salt", {"teacher_load": "teacher", "kd_steps": 4, "kd_weight": 0.5, "kd_transition": "linear", "kd_transition_steps": 2}),
        ("gated", {"teacher_load": "teacher", "kd_steps": 4, "kd_weight": 0.5, "kd_transition": "linear", "kd_transition_steps": 2,
                   "kd_gate": "rank:3"}),
        ("salt_ds", {"teacher_load": "teacher", "stage1_selection": "s.npy", **SALT}),
        ("random", {"teacher_load": "teacher", "stage1_selection": "s.npy", **SALT}),
        ("ds_only", {"stage1_selection": "s.npy", "kd_steps": 4, "kd_weight": 0.0, "stage2_data": "unseen"}),
        ("rkd", {"teacher_load": "teacher", "kd_steps": 10, "kd_weight": 0.5}),
        ("longer", {"train_iters": 13}),
        ("grow", {}),
    ],
)  # fmt: skip
def test_flags_of_each_kind(kind, expected):
    found = flags(kind)
    assert found == expected
    config = build(overlaid(BASE, found))  # they are flags of one run
    assert (config.salt.teacher_load is not None) == (kind in ("salt", "salt_ds", "random", "rkd", "gated"))


def test_every_kind_is_listed():
    assert set(KINDS) == {
        "baseline",
        "salt",
        "salt_ds",
        "rkd",
        "ds_only",
        "random",
        "longer",
        "grow",
        "let",
        "salt_let",
        "gated",
    }


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("let", {"guide": "hidden", "teacher_load": "teacher", "let_steps": 6, "let_layer": 1}),
        ("salt_let", {
            "guide": "both", "teacher_load": "teacher", "let_steps": 6, "let_layer": 1, "kd_steps": 4, "kd_weight": 0.5,
            "kd_transition": "linear", "kd_transition_steps": 2, "teacher_max_dropped_mass": 0.5,
        }),
        ("salt", {
            "teacher_load": "teacher", "kd_steps": 4, "kd_weight": 0.5, "kd_transition": "linear", "kd_transition_steps": 2,
            "kd_stop_margin": 0.5, "teacher_max_dropped_mass": 0.5,
        }),
        ("rkd", {"teacher_load": "teacher", "kd_steps": 10, "kd_weight": 0.5, "teacher_max_dropped_mass": 0.5}),
        ("baseline", {}),
    ],
)  # fmt: skip
def test_flags_of_guided_arms_and_what_the_others_leave_of_them(kind, expected):
    """Of one `salt:` with flags of both methods."""
    found = arm_flags(Arm(name="a", kind=kind, flags={}), GUIDED, {}, BASE, 1, INPUTS)
    assert found == expected
    assert build(overlaid(BASE, found)).salt.stage1_steps == {"let": 6, "salt_let": 6, "salt": 4, "rkd": 10}.get(kind)


def test_an_arm_wins_over_salt_and_an_axis_over_the_arm():
    assert flags("salt", kd_weight=0.7)["kd_weight"] == 0.7
    assert flags("salt", {"kd_weight": 0.8}, kd_weight=0.7)["kd_weight"] == 0.8
    assert flags("rkd", train_iters=6)["kd_steps"] == 6  # the arm's own length


@pytest.mark.parametrize(
    "kind, flag",
    [
        ("baseline", "kd_steps"),
        ("rkd", "kd_steps"),
        ("ds_only", "kd_weight"),
        ("salt", "stage2_data"),
        ("salt", "kd_gate"),
        ("salt_let", "kd_gate"),
        ("salt", "let_steps"),
        ("let", "kd_weight"),
        ("salt_let", "guide"),
    ],
)
def test_a_flag_that_a_kind_sets_or_has_no_use_for_is_refused(kind, flag):
    with pytest.raises(UserError, match=f"kind {kind} has no use for --{flag.replace('_', '-')}"):
        flags(kind, **{flag: 1})


def test_an_arm_of_kind_gated_has_a_gate():
    assert flags("gated", {"kd_gate": "entropy:2"}, kd_gate="probability:0.1")["kd_gate"] == "entropy:2"
    with pytest.raises(UserError, match="kind gated needs --kd-gate: without one its runs are those of kind salt"):
        flags("gated", kd_gate="none")


@pytest.mark.parametrize("kind", ["salt", "gated", "salt_ds", "rkd"])
@pytest.mark.parametrize("name, value, schedule", [
    ("kd_weight", 0.1, "kd_weight_schedule"), ("kd_teacher_temperature", 2.0, "kd_temperature_schedule"),
])  # fmt: skip
def test_an_axis_of_a_value_that_a_schedule_replaces_is_refused(kind, name, value, schedule):
    own = {schedule: ("1:0.9", "3:0.3")}
    with pytest.raises(UserError, match="all be the same: --kd-[a-z]+-schedule 1:0.9 3:0.3 stands in its place"):
        flags(kind, {name: value}, **own)
    assert flags(kind, {schedule: ("1:0.5",)}, **own)[schedule] == ("1:0.5",)


def test_longer_buys_whole_steps_with_the_flops_of_the_teachers_training():
    config = build(BASE)
    assert training_flops(config, 1, vocabulary_size=10) == 10 * STEP_FLOPS  # of the vocabulary, padded to 12 rows
    assert flags("longer") == {"train_iters": 13}  # 3.9 steps: 3 whole ones
    in_samples = overlaid(BASE, {"train_iters": None, "train_samples": 20})
    assert flags("longer", base=in_samples) == {"train_samples": 26}


def test_the_schedule_of_longer_has_its_own_length():
    assert flags("longer", lr_decay_iters=10) == {"train_iters": 13, "lr_decay_iters": 13}
    with pytest.raises(UserError, match="--lr-decay-iters 7 is not the end of the baseline, 10"):
        flags("longer", lr_decay_iters=7)

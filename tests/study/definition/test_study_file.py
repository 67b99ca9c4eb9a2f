"""STUDY.yaml: what it says, and what is refused."""

from __future__ import annotations

import pytest

from megatron_salt.errors import UserError
from megatron_salt.study.definition.study import GrowSource, PrimaryQuestion, SelectionRule
from megatron_salt.study.definition.study_file import parse_study, read_study
from megatron_salt.study.job import SlurmOptions
from tests.study.definition.studies import STUDY, study, write_configs


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    write_configs(tmp_path, monkeypatch)


def test_a_study_is_read_with_its_configs(tmp_path):
    (tmp_path / "STUDY.yaml").write_text(STUDY + "flags: {train_iters: 60}\nslurm: {partition: gpu}\n")
    found = read_study(tmp_path / "STUDY.yaml")
    assert (str(found.output), found.seeds, found.ranks, found.teacher_shared_by) == ("out", (1, 2), 1, 3)
    assert found.sections["training"]["train_iters"] == 60  # a flag over the config
    assert found.sections["model"]["num_layers"] == 4
    assert found.salt == {"kd_steps": 30, "kd_weight": 0.6}
    assert [(arm.name, arm.kind, arm.teacher, arm.selection) for arm in found.arms] == [
        ("baseline", "baseline", None, None),
        ("salt", "salt", "teacher", None),
    ]
    assert found.primary == PrimaryQuestion(arm="salt", against="baseline")
    assert found.slurm == SlurmOptions(partition="gpu")


def test_an_arm_has_a_name_of_its_own_and_changes_what_all_share():
    arms = {
        "sharp": {"kind": "salt", "flags": {"kd_teacher_temperature": 1}},
        "ds_mean": {"kind": "salt_ds", "selection": {"score": "mean"}},
        "stacked": {"kind": "grow", "grow": {"num_layers": 2, "train_iters": 20, "flags": {"lr_warmup_iters": 2}}},
    }
    sharp, ds, grown = study(arms=arms, primary=None).arms
    assert sharp.flags == {"kd_teacher_temperature": 1.0}
    assert ds.selection == SelectionRule(fraction=0.5, scorer_step=80, score="mean")
    assert grown.grow == GrowSource(num_layers=2, train_iters=20, flags={"lr_warmup_iters": 2})


def test_an_arm_names_one_of_several_teachers():
    teachers = {"small": {"config": "teacher.yaml"}, "large": {"load": "/teachers/large", "training_flops": 1e20}}
    arms = {"baseline": None, "salt": {"teacher": "large"}}
    found = study(teacher=None, teachers=teachers, arms=arms)
    assert found.arm("salt").teacher == "large"
    assert found.teachers["large"].load == "/teachers/large"
    with pytest.raises(UserError, match="arms.salt: kind salt needs a teacher.*name one of small, large here"):
        study(teacher=None, teachers=teachers)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": {}}, r"STUDY.yaml: unknown key arm \(did you mean arms\?\)"),
        ({"config": None}, "config is required"),
        ({"config": "absent.yaml"}, "config absent.yaml cannot be read: .*; a path is relative to /"),
        ({"arms": {"salt_sd": None}}, r"arms.salt_sd: needs kind:, since salt_sd is none \(did you mean salt_ds\?\)"),
        ({"arms": {"a": {"kind": "slat"}}}, r"arms.a: there is no kind slat \(did you mean salt\?\); kinds are baseline, salt"),
        ({"arms": {"salt": {"flag": {}}}}, r"arms.salt: unknown key flag \(did you mean flags\?\)"),
        ({"arms": {"salt": {"flags": {"kd_wieght": 1}}}}, r"arms.salt.flags: unknown flag kd_wieght \(did you mean kd_weight\?\)"),
        ({"arms": {"salt": {"flags": {"kd_weight": "x"}}}}, "arms.salt.flags.kd_weight: expected a number, got 'x'"),
        ({"arms": {"salt": {"flags": {"seed": 3}}}}, "--seed is set by the study"),
        ({"arms": {"a/b": {"kind": "salt"}}}, "'a/b' becomes the name of a directory"),
        ({"arms": {}}, "arms: give at least one"),
        ({"arms": {"baseline": {"teacher": "teacher"}}}, "arms.baseline.teacher: kind baseline has none"),
        ({"arms": {"grow": None}}, "kind grow needs grow: with num_layers and train_iters"),
        ({"selection": None, "arms": {"salt_ds": None}}, "arms.salt_ds: kind salt_ds chooses windows: give selection"),
        ({"selection": {"fraction": 1.5}, "arms": {"salt_ds": None}}, "selection: fraction must be above 0 and at most 1, got 1.5"),
        (
            {"selection": {"fraction": 0.5, "score": "men_dropped_20"}, "arms": {"salt_ds": None}},
            r"selection: there is no score men_dropped_20 \(did you mean mean_dropped_20\?\)",
        ),
        ({"selection": {"fraction": 0.5, "score": "mean_dropped_0"}, "arms": {"salt_ds": None}}, "there is no score mean_dropped_0"),
        ({"arms": {"baseline": False}}, "arms.baseline: expected a mapping of kind, .* got False"),
        ({"output": ""}, "output: '.' is no name of a directory"),
        ({"output": "a\0b"}, "is no name of a directory"),
        ({"teacher": None}, "arms.salt: kind salt needs a teacher"),
        ({"teacher": {"load": "a", "config": "teacher.yaml"}}, "teacher: give either load .* or config"),
        ({"teachers": {}}, "teacher: is one teacher and teachers: are several"),
        ({"salt": {"lr": 1}}, "salt: unknown flag lr"),
        ({"flags": {"teacher_load": "x"}}, "flags: --teacher-load is set by the study"),
        ({"seeds": []}, "seeds: give at least one"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"seeds": 3}, r"seeds: expected a list such as \[a, b\], got 3"),
        ({"ranks": 0}, "--ranks must be at least 1, got 0"),
        ({"axes": {"lr": 0.1}}, r"axes.lr: expected a list of values"),
        ({"axes": {"lr": [0.1, 0.1]}}, "axes.lr: a value is given twice: 0.1, 0.1"),
        ({"axes": {"learning_rate": [0.1]}}, "axes: unknown flag learning_rate"),
        ({"primary": {"arm": "slat", "against": "baseline"}}, r"primary.arm: there is no arm slat \(did you mean salt\?\)"),
        ({"primary": {"arm": "salt", "against": "salt"}}, "primary: arm and against are both salt"),
        ({"primary": {"arm": "salt"}}, "primary: against is required"),
        ({"slurm": {"ranks_per_node": 0}}, "slurm: .*ranks_per_node must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match="STUDY.yaml.*" + message.removeprefix("STUDY.yaml")):
        study(**changes)


def test_a_message_names_the_file_once():
    for changes in ({"axes": {"lr": 0.1}}, {"slurm": {"partitoin": "gpu"}}):
        with pytest.raises(UserError) as refused:
            study(**changes)
        assert str(refused.value).count("STUDY.yaml") == 1


def test_a_config_that_sets_what_the_study_sets_is_refused(tmp_path):
    (tmp_path / "taught.yaml").write_text("salt: {teacher_load: t, kd_steps: 3}\n")
    with pytest.raises(UserError, match="config taught.yaml has --teacher-load t, which the study sets"):
        study(config="taught.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c"])
def test_text_that_is_no_mapping_is_refused(text):
    with pytest.raises(UserError, match=r"STUDY.yaml"):
        parse_study(text, "STUDY.yaml")

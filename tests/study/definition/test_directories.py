"""What a study finds in its directories: its own work goes on, other work is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.errors import UserError
from megatron_salt.study.definition.directories import begin, other_runs, refuse_other_work
from megatron_salt.study.definition.plan_jobs import StudyPlan, plan_jobs
from tests.study.definition.studies import study, write_configs

RUN = Path("out/runs/salt/seed_1")
TEACHER = Path("out/teachers/teacher")
DS = {"baseline": None, "salt": None, "salt_ds": None}


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    write_configs(tmp_path, monkeypatch)


def begun(plan: StudyPlan, *trained: Path) -> None:
    """Begin a study, and leave a log where a run has trained."""
    begin(plan, Path("out"), b"text")
    for directory in trained:
        (directory / "train.jsonl").write_text("{}\n")


def checkpoint(directory: Path, step: int) -> None:
    (directory / f"iter_{step:07d}").mkdir(parents=True)


def test_every_training_has_its_whole_configuration_in_its_directory():
    plan = plan_jobs(study(arms=DS), None)
    jobs = begin(plan, Path("out"), b"the study's file")
    assert jobs == plan.jobs
    assert Path("out/study.yaml").read_bytes() == b"the study's file"
    assert {
        name: from_yaml((job.directory / "config.yaml").read_text(), "") for job in jobs if (name := job.name) in plan.configs
    } == plan.configs
    refuse_other_work(plan)  # its own


def test_a_run_with_other_flags_is_refused_with_both_values():
    begun(plan_jobs(study(), None), RUN)
    with pytest.raises(UserError, match=f"{RUN} holds a run with other flags: --lr is 0.001 there and 0.002 here"):
        refuse_other_work(plan_jobs(study(flags={"lr": 0.002}), None))
    with pytest.raises(UserError, match=r"--kd-weight is 0.6 there and 0.5 here\. Give the arm another name"):
        refuse_other_work(plan_jobs(study(salt={"kd_steps": 30, "kd_weight": 0.5}), None))


def test_what_has_not_begun_may_change():
    begin(plan_jobs(study(), None), Path("out"), b"")
    changed = plan_jobs(study(flags={"lr": 0.002}), None)
    refuse_other_work(changed)
    begin(changed, Path("out"), b"")
    assert from_yaml((RUN / "config.yaml").read_text(), "").optimizer.lr == 0.002


def test_arms_seeds_and_values_may_be_added():
    begun(plan_jobs(study(), None), RUN, TEACHER)
    refuse_other_work(plan_jobs(study(arms=DS, seeds=[1, 2, 3], axes={"lr": [0.002]}), None))


def test_a_step_that_scores_must_be_among_the_teachers_checkpoints():
    begun(plan_jobs(study(), None), TEACHER)
    checkpoint(TEACHER, 200)
    with pytest.raises(UserError, match=r"out/teachers/teacher has no checkpoint of step 80 \(scorer_step\).*it has 200"):
        refuse_other_work(plan_jobs(study(arms=DS), None))
    checkpoint(TEACHER, 80)
    refuse_other_work(plan_jobs(study(arms=DS), None))


def test_a_run_that_no_study_began_is_refused():
    checkpoint(RUN, 5)
    with pytest.raises(UserError, match="holds a run that no study began"):
        refuse_other_work(plan_jobs(study(), None))


def test_scores_of_another_command_are_refused():
    plan = plan_jobs(study(arms=DS), None)
    begin(plan, Path("out"), b"")
    Path("out/scores/teacher-80/outcome.txt").write_text("done - job -.0 finished\n")
    refuse_other_work(plan)
    with pytest.raises(UserError, match="out/scores/teacher-80 was made by another command: .*there.*--seq-length 4.*here"):
        refuse_other_work(plan_jobs(study(arms=DS, flags={"seq_length": 4}), None))


def test_a_grown_run_with_a_checkpoint_goes_on_from_it():
    arms = {"grow": {"grow": {"num_layers": 2, "train_iters": 20}}}
    plan = plan_jobs(study(arms=arms, primary=None, seeds=[1]), None)
    assert "--finetune" in begin(plan, Path("out"), b"")[-1].command
    checkpoint(Path("out/runs/grow/seed_1"), 5)
    assert "--finetune" not in begin(plan, Path("out"), b"")[-1].command


def test_runs_that_the_study_no_longer_has_are_told():
    begun(plan_jobs(study(), None))
    assert other_runs(plan_jobs(study(seeds=[1]), None), Path("out")) == [
        Path("out/runs/baseline/seed_2"),
        Path("out/runs/salt/seed_2"),
    ]
    assert other_runs(plan_jobs(study(), None), Path("out")) == []


def test_a_changed_option_of_any_section_is_seen():
    plan = plan_jobs(study(), None)
    begun(plan, RUN)
    config = plan.configs["salt-seed_1"]
    other = replace(config, data=replace(config.data, eod_mask_loss=True))
    with pytest.raises(UserError, match="--eod-mask-loss is false there and true here"):
        refuse_other_work(replace(plan, configs={**plan.configs, "salt-seed_1": other}))

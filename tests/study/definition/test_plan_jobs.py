"""From a study to its jobs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt.cli import parse_flags
from megatron_salt.errors import UserError
from megatron_salt.study.definition.plan_jobs import TeacherFacts, plan_jobs
from megatron_salt.study.definition.study import KINDS
from megatron_salt.study.definition.study_file import parse_study
from megatron_salt.study.job import goes_on
from megatron_salt.tools.flags.score_config import ScoreConfig
from megatron_salt.tools.flags.select_config import SelectConfig
from tests.study.definition.studies import study, write_configs

ROOT = Path(__file__).parents[3]
FACTS = TeacherFacts(vocabulary_size=100, training_flops={"teacher": 1e9})
GROW = {"grow": {"num_layers": 2, "train_iters": 20}}
LET = {"flags": {"let_steps": 4, "let_layer": 1}}
NEEDED: dict[str, object] = {"grow": GROW, "let": LET, "salt_let": LET, "gated": {"flags": {"kd_gate": "rank:3"}}}
ALL = {kind: NEEDED.get(kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def configs(tmp_path, monkeypatch):
    write_configs(tmp_path, monkeypatch)


def test_jobs_come_after_what_they_need_and_shared_ones_once():
    plan = plan_jobs(study(arms=ALL), FACTS)
    done: set[str] = set()
    for job in plan.jobs:
        assert done.issuperset(job.needs), job
        done.add(job.name)
    assert (
        len(done) == len(plan.jobs) == 1 + 1 + 3 + 4 + 22
    )  # teacher; scores; top and two random choices; sources and stacks; runs
    needs = {job.name: job.needs for job in plan.jobs}
    assert needs["score-teacher-80"] == ("teacher",)
    assert needs["salt-seed_1"] == ("teacher",)
    assert needs["baseline-seed_1"] == needs["longer-seed_1"] == ()
    assert needs["ds_only-seed_2"] == ("select-teacher-80-mean_dropped_20-0.5",)
    assert needs["random-seed_2"] == ("teacher", "select-teacher-80-random_2-0.5")
    assert needs["grow-seed_2"] == ("stack-grow-seed_2",)
    assert needs["stack-grow-seed_2"] == ("source-grow-seed_2",)
    assert plan_jobs(study(arms=ALL), FACTS) == plan


def test_runs_of_a_seed_differ_in_nothing_but_what_the_arm_is_about():
    plan = plan_jobs(study(arms=ALL), FACTS)
    assert [(run.seed, run.arm) for run in plan.runs] == [(seed, kind) for seed in (1, 2) for kind in KINDS]
    baseline = {run.seed: run.config for run in plan.runs if run.arm == "baseline"}
    for run in plan.runs:
        config, plain = run.config, baseline[run.seed]
        assert config.training.seed == run.seed
        assert config.data == plain.data
        assert config.model == plain.model
        assert config.checkpoint.save == str(run.directory) == f"out/runs/{run.arm}/seed_{run.seed}"
        if run.arm in ("salt", "rkd", "let", "salt_let", "gated"):
            assert replace(config, salt=plain.salt, checkpoint=plain.checkpoint) == plain
        assert config.checkpoint.load == config.checkpoint.save  # goes on from its own checkpoint


def test_a_grown_run_begins_with_the_stacked_weights_and_goes_on_from_its_own():
    job = next(job for job in plan_jobs(study(arms=ALL), FACTS).jobs if job.name == "grow-seed_1")
    ordinary = ("-m", "megatron_salt.pretrain", "--config", "out/runs/grow/seed_1/config.yaml")
    assert job.command == (*ordinary, "--load", "out/grow/grow/seed_1/stacked/checkpoint", "--finetune")
    assert goes_on(job.command) == goes_on(goes_on(job.command)) == ordinary


def test_runs_that_draw_the_same_samples_for_a_cache_are_known():
    """Those of one seed, unless a selection or the batch size tells them apart; rkd has the longest stage 1."""
    arms = dict.fromkeys(("baseline", "salt", "rkd", "salt_ds")) | {
        "flat": {"kind": "salt", "flags": {"kd_weight": 0.5}},
        "let": LET,
    }
    plan = plan_jobs(study(arms=arms, salt={"kd_steps": 30, "teacher_cache": "cache"}, axes={"global_batch_size": [8]}), None)
    cached = {job.name: job.cached for job in plan.jobs if job.cached is not None}
    assert {name: one.steps for name, one in cached.items() if name.endswith("seed_1")} == {
        "salt-seed_1": 30, "flat-seed_1": 30, "salt_ds-seed_1": 30, "rkd-seed_1": 100, "salt-global_batch_size=8-seed_1": 30,
        "let-seed_1": 4, "let-global_batch_size=8-seed_1": 4,
        "flat-global_batch_size=8-seed_1": 30, "salt_ds-global_batch_size=8-seed_1": 30, "rkd-global_batch_size=8-seed_1": 100,
    }  # fmt: skip
    alike = [name for name, one in cached.items() if one.order == cached["salt-seed_1"].order]
    assert alike == ["salt-seed_1", "rkd-seed_1", "flat-seed_1", "let-seed_1"]
    assert len({one.order for one in cached.values()}) == 2 * 2 * 2  # seeds, batch sizes, with and without a selection
    arms = dict.fromkeys(("baseline", "salt", "let", "salt_let"))
    plan = plan_jobs(study(arms=arms, salt={"kd_steps": 30, "let_steps": 40, "let_layer": 1, "teacher_cache": "cache"}), None)
    guided = {job.name: job.cached for job in plan.jobs if job.cached is not None and job.seed == 1}
    assert {name: one.steps for name, one in guided.items()} == {"salt-seed_1": 30, "let-seed_1": 40, "salt_let-seed_1": 40}
    assert len({one.order for one in guided.values()}) == 1
    assert all(job.cached is None for job in plan_jobs(study(), None).jobs)


def test_guided_runs_share_a_cache_for_as_long_as_the_teacher_teaches():
    arms = {"baseline": None, "salt": None, "let": LET, "salt_let": {"flags": {"let_steps": 40, "let_layer": 1}}}
    plan = plan_jobs(study(arms=arms, salt={"kd_steps": 30, "teacher_cache": "cache"}), None)
    cached = {job.name: job.cached for job in plan.jobs if job.cached is not None and job.name.endswith("seed_1")}
    assert {name: one.steps for name, one in cached.items()} == {"salt-seed_1": 30, "let-seed_1": 4, "salt_let-seed_1": 40}
    assert len({one.order for one in cached.values()}) == 1


def test_the_jobs_before_runs_are_commands_of_the_tools():
    jobs = {job.name: job for job in plan_jobs(study(arms=ALL, ranks=2), FACTS).jobs}
    score = jobs["score-teacher-80"]
    assert (score.command[:2], score.ranks) == (("-m", "megatron_salt.tools.score_data"), 2)
    flags = parse_flags(ScoreConfig, score.command[2:])
    assert (flags.teacher_load, flags.data_path) == ("out/teachers/teacher/iter_0000080", ("data/train",))
    assert (flags.seq_length, flags.score_top_k) == (8, (1, 10, 20, 50, 100))
    top = parse_flags(SelectConfig, jobs["select-teacher-80-mean_dropped_20-0.5"].command[2:])
    assert (top.rule, top.score, top.fraction, top.overwrite) == ("top", "mean_dropped_20", 0.5, True)
    assert top.scores == (flags.output,)
    random = parse_flags(SelectConfig, jobs["select-teacher-80-random_2-0.5"].command[2:])
    assert (random.rule, random.seed, random.fraction) == ("random", 2, 0.5)
    stack = jobs["stack-grow-seed_1"]
    assert stack.ranks == 0
    assert stack.command[1:] == (
        "megatron_salt.convert.grow_command", "--load", "out/grow/grow/seed_1/source", "--num-layers", "4",
        "--save", "out/grow/grow/seed_1/stacked/checkpoint", "--overwrite",
    )  # fmt: skip


def test_arms_that_choose_by_several_scores_share_one_scoring():
    arms = {name: {"kind": "salt_ds", "selection": {"score": name}} for name in ("mean_dropped_20", "share_30", "mean")}
    plan = plan_jobs(study(arms=arms, primary=None), None)
    (score,) = [job for job in plan.jobs if job.kind == "score"]
    assert parse_flags(ScoreConfig, score.command[2:]).score_top_k == (1, 10, 20, 30, 50, 100)


def test_what_a_study_trains_before_its_runs():
    plan = plan_jobs(study(arms=ALL), FACTS)
    teacher, source = plan.configs["teacher"], plan.configs["source-grow-seed_2"]
    assert teacher.checkpoint.save_at == (80,)  # the step that scores is kept
    assert teacher.training.seed == 7
    assert (source.model.num_layers, source.training.train_iters, source.training.seed) == (2, 20, 2)
    assert source.checkpoint.load == source.checkpoint.save == "out/grow/grow/seed_2/source"
    assert not source.checkpoint.finetune


def test_a_length_in_samples_gives_the_model_that_is_stacked_its_own_steps():
    plan = plan_jobs(study(arms={"grow": GROW}, primary=None, flags={"train_iters": None, "train_samples": 400}), None)
    run, source = plan.configs["grow-seed_1"].training, plan.configs["source-grow-seed_1"].training
    assert (run.train_iters, run.train_samples) == (None, 400)
    assert (source.train_iters, source.train_samples) == (20, None)


def test_a_teacher_that_exists_is_not_trained():
    plan = plan_jobs(study(teacher={"load": "elsewhere/teacher"}, arms={"salt": None, "salt_ds": None}, primary=None), None)
    assert [job.kind for job in plan.jobs] == ["score", "select", "run", "run", "run", "run"]
    assert {run.config.salt.teacher_load for run in plan.runs} == {"elsewhere/teacher"}
    assert "elsewhere/teacher/iter_0000080" in plan.jobs[0].command


def test_an_axis_at_a_time_and_only_where_it_means_something():
    axes = {"kd_weight": [0.6, 0.5], "lr": [0.001, 0.002]}
    plan = plan_jobs(study(axes=axes, seeds=[1]), None)
    assert [run.label for run in plan.runs] == ["baseline", "baseline lr=0.002", "salt", "salt kd_weight=0.5", "salt lr=0.002"]
    assert [run.config.optimizer.lr for run in plan.runs] == [0.001, 0.002, 0.001, 0.001, 0.002]
    assert plan.runs[3].config.salt.kd_weight == 0.5
    assert plan.runs[3].directory == Path("out/runs/salt/kd_weight=0.5/seed_1")
    assert plan.runs[3].settings == {"kd_weight": "0.5"}


def test_a_part_of_a_study_has_what_its_runs_need():
    plan = plan_jobs(study(arms=ALL), FACTS).part(["ds_only"], [2])
    assert [job.name for job in plan.jobs] == [
        "teacher", "score-teacher-80", "select-teacher-80-mean_dropped_20-0.5", "ds_only-seed_2",
    ]  # fmt: skip
    assert set(plan.configs) == {"teacher", "ds_only-seed_2"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"primary": {"arm": "salt", "against": "baseline", "figure": "valid/los"}},
         r"primary.figure valid/los: the runs have no such figure \(did you mean valid/loss\?\); they have valid/loss, valid/perplexity"),
        ({"figures": {"out_of_domain": ["valid/prose/bits_per_byte"]}}, "figures.out_of_domain valid/prose/bits_per_byte: the runs have"),
        ({"figures": {"tasks": ["task/piqa/acc"]}}, "figures.tasks task/piqa/acc: .*; --eval-tasks names no task"),
        ({"flags": {"eval_iters": 0}}, "primary.figure valid/loss: .*: --eval-iters is 0"),
        ({"flags": {"valid_data_path": []}}, "primary.figure valid/loss: .*: neither --valid-data-path nor --valid-share"),
        ({"flags": {"valid_data_path": {"prose": "data/held"}}}, "primary.figure valid/loss: .*; they have valid/prose/loss"),
        ({"salt": {}}, "arm salt, seed 1: --teacher-load .* needs --kd-steps"),
        ({"ranks": 3}, "arm baseline, seed 1: --global-batch-size 4 is not divisible"),
        ({"axes": {"lr": [-1.0]}}, "arm baseline, seed 1, --lr -1.0: --lr must be at least 0, got -1.0"),
        ({"teacher": {"config": "teacher.yaml", "flags": {"train_iters": 50}}, "arms": {"baseline": None, "salt": None, "salt_ds": None}},
         "teacher teacher: --save-at 80 lies beyond the run's last step, 50"),
        ({"arms": {"baseline": None, "salt": None, "grow": {"grow": {"num_layers": 3, "train_iters": 20}}}},
         "arm grow, the model that is stacked: 3 layers cannot be stacked to --num-layers 4"),
        ({"arms": {"salt_ds": None}, "primary": None, "axes": {"seq_length": [4]}}, "job score-teacher-80 would have two commands"),
    ],
)  # fmt: skip
def test_every_run_is_checked_before_any_starts(changes, message):
    with pytest.raises(UserError, match=message):
        plan_jobs(study(**changes), None)


def test_the_studies_of_the_documentation_are_some(monkeypatch):
    monkeypatch.chdir(ROOT)
    first, whole = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/study.md").read_text(), re.DOTALL)
    assert len(plan_jobs(parse_study(first, "docs/study.md"), FACTS).jobs) == 5
    plan = plan_jobs(parse_study(whole, "docs/study.md"), FACTS)
    assert len(plan.jobs) == 66
    assert {run.arm for run in plan.runs} == {
        "baseline",
        "salt",
        "salt_ds",
        "longer",
        "flatter",
        "grow",
        "gated",
        "let",
        "salt_let",
    }
    assert {run.label for run in plan.runs if run.settings} == {
        f"{arm} kd_weight={w}" for arm in ("salt", "salt_ds", "flatter", "gated", "salt_let") for w in (0.5, 0.8)
    }

"""tools/study.py from the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_salt import yaml_core
from megatron_salt.study.analysis.ledger import Spent
from megatron_salt.study.command import main
from megatron_salt.study.definition.arms import training_flops
from megatron_salt.study.definition.plan_jobs import plan_jobs
from megatron_salt.study.definition.study_file import parse_study, read_study
from megatron_salt.study.definition.teacher_facts import planned_flops, read_teacher_facts
from megatron_salt.study.preparations import read_preparations
from megatron_salt.study.results import RunResult
from tests.study.definition.studies import STUDY, write_configs
from tests.support.datasets import run as preprocess
from tests.support.datasets import write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A directory with data/train, of which a byte is a token."""
    directory = tmp_path_factory.mktemp("study")
    (directory / "data").mkdir()
    for name, count in (("train", 300), ("held", 40)):
        words = random.Random(name)
        texts = [" ".join(words.choices(("alpha", "beta", "gamma", "delta"), k=40)) for _ in range(count)]
        assert preprocess(write_lines(directory / f"{name}.jsonl", texts), directory / "data" / name, "--append-eod") == 0
    for file in (directory / "data").iterdir():
        file.rename(file.with_name(file.name.replace("_text_document", "")))
    return directory


@pytest.fixture
def here(tmp_path, monkeypatch, data) -> Path:
    write_configs(tmp_path, monkeypatch)
    (tmp_path / "data").symlink_to(data / "data")
    (tmp_path / "STUDY.yaml").write_text(STUDY)
    return tmp_path


def rewrite(**changes: object) -> None:
    Path("STUDY.yaml").write_text(yaml_core.dump(yaml_core.load(STUDY) | changes))


def test_a_dry_run_tells_jobs_and_flops_and_writes_nothing(here, capsys):
    rewrite(arms={"baseline": None, "salt": None, "salt_ds": None})
    before = sorted(here.iterdir())
    assert main(["STUDY.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert sorted(here.iterdir()) == before
    for name in ("teacher ", "score-teacher-80 ", "salt-seed_2 "):
        assert any(line.startswith(name) and "waiting" in line and "FLOPs" in line for line in told.splitlines()), name
    assert "9 jobs in out: 9 waiting" in told
    assert main(["STUDY.yaml", "--dry-run", "--arms", "baseline", "--seeds", "2"]) == 0
    assert "1 jobs in out: 1 waiting" in capsys.readouterr().out


def test_flops_of_jobs_by_hand(here):
    study = parse_study(STUDY + "flags: {train_iters: 40}\n", "STUDY.yaml")
    plan = plan_jobs(study, None)
    flops = planned_flops(study, plan)
    rows = 384  # 257 ids, padded to a multiple of 128
    token = 2 * (4 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * rows) + 4 * 2 * 16 * 8  # 4 layers, width 16, 8 tokens; forward
    of_teacher = 2 * (4 * 8 * 8 + 2 * 8 * 32 + 8 * rows) + 2 * 8 * 8
    tokens = 4 * 8  # of a step
    assert flops["baseline-seed_1"] == 3 * token * tokens * 40
    assert flops["salt-seed_1"] == 3 * token * tokens * 40 + of_teacher * tokens * 30  # kd_steps
    assert flops["teacher"] == 3 * of_teacher * tokens * 200
    assert read_teacher_facts(study, ["teacher"]).training_flops == {"teacher": flops["teacher"]}
    assert training_flops(plan.configs["teacher"], 1, 257) == flops["teacher"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arms", "slat"], "--arms slat: the study has baseline, salt (did you mean salt?)"),
        (["--seeds", "3"], "--seeds 3: the study has 1, 2"),
        (["--slurm", "--dry-run"], "--slurm and --dry-run are two things to do"),
        (["--local", "0"], "--local must be at least 1, got 0"),
        (["--dry"], "unknown flag --dry"),
    ],
)
def test_mistakes_in_flags_are_one_line(here, capsys, flags, message):
    assert main(["STUDY.yaml", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_study_that_is_not_there_is_one_line(here, capsys):
    assert main(["ABSENT.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: ABSENT.yaml cannot be read")


def test_a_flag_that_a_run_refuses_stops_all_before_anything_is_written(here, capsys):
    rewrite(arms={"baseline": None, "salt": None, "bad": {"kind": "salt", "flags": {"kd_weight": 1.5}}})
    assert main(["STUDY.yaml"]) == 2
    assert "arm bad, seed 1: --kd-weight must lie in [0.0, 1.0], got 1.5" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_report_needs_no_run(here, capsys):
    assert main(["STUDY.yaml", "--only-report"]) == 0
    told = capsys.readouterr().out
    assert "salt, seed 2: waiting" in told
    assert "Is salt better than baseline in valid/loss" in Path("out/report/report.md").read_text()
    assert not Path("out/runs").exists()


@pytest.mark.long
def test_a_study_from_its_file_to_its_page(here, capsys):
    """All that only works together: a teacher, its scores, a selection, a stacked model, eight runs, a second start, the report."""
    student = yaml_core.load(Path("student.yaml").read_text())
    student["training"] |= {"train_iters": 6, "eval_interval": 3, "eval_iters": 2, "micro_batch_size": 4, "seq_length": 32}
    student["optimizer"] |= {"lr_warmup_iters": 1}
    student["data"]["valid_data_path"] = ["data/held"]
    student["parallel"] = {"device": "cpu"}
    Path("student.yaml").write_text(yaml_core.dump(student))
    teacher = yaml_core.load(Path("teacher.yaml").read_text())
    teacher["training"] |= {"train_iters": 6, "micro_batch_size": 4, "seq_length": 32}
    teacher["parallel"] = {"device": "cpu"}
    Path("teacher.yaml").write_text(yaml_core.dump(teacher))
    rewrite(
        seeds=[1],
        salt={"kd_steps": 2},
        selection={"fraction": 0.5, "scorer_step": 3, "score": "mean_dropped_10"},
        arms={"baseline": None, "salt_ds": None, "grow": {"grow": {"num_layers": 2, "train_iters": 2}}},
        primary={"arm": "salt_ds", "against": "baseline"},
    )
    assert main(["STUDY.yaml", "--local", "2"]) == 0
    told = capsys.readouterr().out
    assert "salt_ds, seed 1: finished  held-out loss" in told
    assert Path("out/report/report.md").is_file()
    logs = {path: path.stat().st_mtime_ns for path in Path("out").rglob("train.jsonl")}
    assert len(logs) == 1 + 1 + 3  # teacher, what is stacked, runs
    assert main(["STUDY.yaml", "--local", "2"]) == 0
    assert logs == {path: path.stat().st_mtime_ns for path in Path("out").rglob("train.jsonl")}  # nothing was done again
    study = read_study(Path("STUDY.yaml"))
    plan = plan_jobs(study, None)
    flops, prepared = planned_flops(study, plan), read_preparations(study, plan)

    def preparation(arm: str):
        result = RunResult(
            arm=arm, kind="salt_ds", seed=1, settings={}, directory=Path(), state="finished", reason="", config=None, curve=None
        )
        return prepared(result)

    assert preparation("salt_ds").teacher_training.flops == flops["teacher"]
    assert preparation("salt_ds").scoring.flops == pytest.approx(flops["score-teacher-3"], rel=0.01)
    assert preparation("salt_ds").scoring.seconds > 0
    assert preparation("salt_ds").runs_that_share == 3
    assert preparation("grow").grow_source.flops == flops["source-grow-seed_1"]
    assert preparation("baseline").grow_source == Spent(0.0, 0.0)

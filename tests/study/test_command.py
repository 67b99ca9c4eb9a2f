"""tools/study.py from the command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_salt import yaml_core
from megatron_salt.study.analysis.ledger import UNKNOWN, Preparation
from megatron_salt.study.command import main
from megatron_salt.study.definition.arms import training_flops
from megatron_salt.study.definition.plan_jobs import plan_jobs
from megatron_salt.study.definition.study import Study
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


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--only-report"]])
@pytest.mark.parametrize(
    "output, message",
    [
        ("student.yaml", "error: output: student.yaml cannot be written"),
        ("student.yaml/study", "error: output: student.yaml/study cannot be written"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_output_that_cannot_be_a_directory_is_one_line(here, capsys, output, message, flags):
    rewrite(output=output)
    assert main(["STUDY.yaml", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_flag_that_a_run_refuses_stops_all_before_anything_is_written(here, capsys):
    rewrite(arms={"baseline": None, "salt": None, "bad": {"kind": "salt", "flags": {"kd_weight": 1.5}}})
    assert main(["STUDY.yaml"]) == 2
    assert "arm bad, seed 1: --kd-weight must lie in [0.0, 1.0], got 1.5" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"flags": {"data_path": ["data/absent"]}}, "--data-path data/absent: data/absent.idx does not exist"),
        ({"teacher": {"load": "nowhere"}}, "teacher teacher: load: nowhere holds no checkpoint"),
        (
            {"teacher": {"load": "there"}, "arms": {"salt_ds": None}, "primary": None},
            "no checkpoint of step 80 (scorer_step); it has 200",
        ),
    ],
)
def test_what_the_study_needs_and_does_not_make_must_be_there(here, capsys, changes, message):
    Path("there/iter_0000200").mkdir(parents=True)
    rewrite(**changes)
    assert main(["STUDY.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_report_needs_no_run(here, capsys):
    assert main(["STUDY.yaml", "--only-report"]) == 0
    told = capsys.readouterr().out
    assert "salt, seed 2: waiting" in told
    assert "Is salt better than baseline in valid/loss" in Path("out/report/report.md").read_text()
    assert not Path("out/runs").exists()


def small_runs(arms: dict[str, object]) -> None:
    """Let the runs of STUDY.yaml be as short as they can be, and evaluate."""
    for name in ("student.yaml", "teacher.yaml"):
        config = yaml_core.load(Path(name).read_text())
        config["training"] |= {"train_iters": 6, "eval_interval": 3, "eval_iters": 2, "micro_batch_size": 4, "seq_length": 32}
        config["data"]["valid_data_path"] = ["data/held"]
        config["parallel"] = {"device": "cpu"}
        Path(name).write_text(yaml_core.dump(config))
    rewrite(
        flags={"lr_warmup_iters": 1},
        seeds=[1],
        salt={"kd_steps": 2},
        selection={"fraction": 0.5, "scorer_step": 3, "score": "mean_dropped_10"},
        arms=arms,
        primary={"arm": next(arm for arm in arms if arm != "baseline"), "against": "baseline"},
    )


def preparation_of(study: Study, arm: str) -> Preparation:
    result = RunResult(
        arm=arm, kind="salt", seed=1, settings={}, directory=Path(), state="finished", reason="", config=None, curve=None
    )
    return read_preparations(study, plan_jobs(study, None))(result)


@pytest.mark.long
def test_a_study_from_its_file_to_its_report(here, capsys):
    small_runs({"baseline": None, "salt_ds": None})
    assert main(["STUDY.yaml", "--local", "2"]) == 0
    assert "salt_ds, seed 1: finished  held-out loss" in capsys.readouterr().out
    assert "salt_ds" in Path("out/report/report.md").read_text()
    logs = {path: path.stat().st_mtime_ns for path in Path("out").rglob("train.jsonl")}
    assert len(logs) == 3  # the teacher and both runs
    assert main(["STUDY.yaml", "--local", "2"]) == 0
    assert logs == {path: path.stat().st_mtime_ns for path in Path("out").rglob("train.jsonl")}  # nothing was done again
    study = read_study(Path("STUDY.yaml"))
    flops = planned_flops(study, plan_jobs(study, None))
    taught = preparation_of(study, "salt_ds")
    assert taught.teacher_training is not None
    assert taught.teacher_training.flops == flops["teacher"]
    assert taught.scoring.flops == pytest.approx(flops["score-teacher-3"], rel=0.01)  # the data are not whole windows
    assert taught.scoring.seconds > 0
    assert taught.runs_that_share == 3
    assert preparation_of(study, "baseline").teacher_training == UNKNOWN


@pytest.mark.full
def test_a_study_of_the_other_arms(here, capsys):
    arms = dict.fromkeys(("baseline", "salt", "rkd", "ds_only", "random"))
    small_runs(arms | {"grow": {"grow": {"num_layers": 2, "train_iters": 2}}})
    assert main(["STUDY.yaml", "--local", "2"]) == 0
    told = capsys.readouterr().out
    assert all(f"{arm}, seed 1: finished  held-out loss" in told for arm in (*arms, "grow"))
    study = read_study(Path("STUDY.yaml"))
    flops = planned_flops(study, plan_jobs(study, None))
    assert preparation_of(study, "grow").grow_source.flops == flops["source-grow-seed_1"]
    assert preparation_of(study, "random").scoring.flops > 0

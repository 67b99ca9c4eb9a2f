"""What went before the runs of a study, from files of its jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.study.analysis.ledger import NOTHING, UNKNOWN, Preparation, Spent
from megatron_salt.study.definition.plan_jobs import plan_jobs
from megatron_salt.study.definition.preparation import checkpoints_of
from megatron_salt.study.preparations import read_preparations
from megatron_salt.study.results import Kind, RunResult
from tests.metrics.logs import write_run
from tests.study.definition.studies import study, write_configs


def preparation(kind: Kind, **changes: object) -> Preparation:
    """That of the first run of the arm of this name."""
    defined = study(**changes)
    plan = plan_jobs(defined, None)
    result = RunResult(
        arm=kind, kind=kind, seed=1, settings={}, directory=Path("out"), state="waiting", reason="", config=None, curve=None
    )
    return read_preparations(defined, plan)(result)


def test_training_of_a_teacher_is_read_from_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of 8e11 FLOPs and half a second."""
    write_configs(tmp_path, monkeypatch)
    assert preparation("salt").teacher_training == UNKNOWN
    teacher = checkpoints_of(study(), study().teachers["teacher"])
    teacher.parent.mkdir(parents=True)
    write_run(teacher, [4.0] * 4, {}).rename(teacher / "train.jsonl")
    found = preparation("salt")
    assert found.teacher_training == Spent(3.2e12, 2.0) and found.runs_that_share == 3
    assert found.teacher is not None and found.teacher.hidden_size == 8
    assert (found.scoring, found.selection, found.grow_source) == (NOTHING, NOTHING, NOTHING)
    assert preparation("baseline") == Preparation(runs_that_share=3)


def test_of_a_teacher_that_existed_flops_may_be_told_without_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_configs(tmp_path, monkeypatch)
    assert preparation("salt", teacher={"load": "elsewhere"}).teacher_training == UNKNOWN
    assert preparation("salt", teacher={"load": "elsewhere", "training_flops": 5e9}).teacher_training == Spent(5e9, None)
    write_run(tmp_path / "elsewhere", [4.0] * 4, {}).rename(tmp_path / "elsewhere" / "train.jsonl")
    assert preparation("salt", teacher={"load": "elsewhere"}).teacher_training == Spent(3.2e12, 2.0)
    assert preparation("salt", teacher={"load": "elsewhere", "training_flops": 5e9}).teacher_training == Spent(5e9, 2.0)

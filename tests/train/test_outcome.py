"""The last word of a run, for a launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.train.outcome import write_outcome
from tests.program import refused, train, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


def test_a_run_says_whether_it_is_done_or_wants_to_go_on(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=3, save=tmp_path / "run", load=tmp_path / "run", outcome_file=tmp_path / "outcome")
    train(2, **flags, exit_interval=2)
    assert (tmp_path / "outcome").read_text() == "left 2 job -.0 before its last step, 3\n"
    train(2, **flags)
    assert (tmp_path / "outcome").read_text() == "done 3 job -.0 after its last step\n"
    train(2, **flags)  # nothing is left to do
    assert (tmp_path / "outcome").read_text().startswith("done 3 ")
    assert [path.name for path in tmp_path.glob("outcome*")] == ["outcome"]


def test_a_mistake_is_a_refusal_with_its_reason(tmp_path: Path, data: str) -> None:
    reason = refused(2, data_path=data, train_iters=3, outcome_file=tmp_path / "outcome", teacher_load=tmp_path, kd_steps=2)
    assert (tmp_path / "outcome").read_text() == f"refused - job -.0 {reason}\n"


def test_the_line_names_job_and_restart_and_a_disk_that_cannot_take_it_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write_outcome(str(tmp_path / "outcome"), "left", 9, "two\nlines")
    assert (tmp_path / "outcome").read_text() == "left 9 job 17.2 two lines\n"
    write_outcome(str(tmp_path / "not there" / "outcome"), "left", 9, "")
    write_outcome(None, "left", 9, "")

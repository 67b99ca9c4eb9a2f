"""--outcome-file: the line by which a launcher knows how a run ended."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_salt import pretrain
from megatron_salt.checkpoint import save_directory
from megatron_salt.config import RunConfig
from megatron_salt.errors import MachineError, NonFiniteError, SaveError, UserError
from megatron_salt.metrics.stragglers import Heartbeat
from megatron_salt.train import run as run_module
from megatron_salt.train.launcher import write_outcome
from tests.support.program import refused, train, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


def test_a_run_says_whether_it_is_done_or_wants_to_go_on(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=3, save=tmp_path / "run", load=tmp_path / "run", outcome_file=tmp_path / "outcome")
    train(2, **flags, exit_interval=2)
    assert (
        tmp_path / "outcome"
    ).read_text() == "left 2 job -.0 before its last step, 3: step 2 is a multiple of --exit-interval 2\n"
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


def test_a_side_file_that_cannot_be_written_or_removed_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("write_text", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    write_outcome(str(tmp_path / "outcome"), "done", 9, "")
    heartbeat = Heartbeat(str(tmp_path / "beat"), active=True, clock=iter(range(0, 1000, 20)).__next__)
    for step in range(3):
        heartbeat.beat(step)
    assert [message.split()[0] for message in caplog.messages] == ["--outcome-file", "--heartbeat-file"]


@pytest.mark.parametrize("number, room, there, word", [
    (errno.ENOSPC, 4096, "", "unsaved"), (errno.EDQUOT, 4096, "", "unsaved"), (errno.ENOSPC, 8, "", None), (errno.ENOSPC, None, "", None),
    (errno.EROFS, 4096, "", None), (errno.ENOSPC, 4096, "left 3 job 1.0 earlier", "left"),
])  # fmt: skip
def test_on_a_full_disk_the_line_goes_where_a_launcher_left_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, room: int | None, there: str, word: str | None
) -> None:
    path = tmp_path / "outcome"
    if room is not None:
        path.write_text(there.ljust(room - 1) + "\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "write_text", full)
    write_outcome(str(path), "unsaved", 9, "no room")
    found = path.read_text().split() if path.exists() else []
    assert (found[0] if found else None) == word
    assert word != "unsaved" or " ".join(found) == "unsaved 9 job -.0 no room"
    assert not room or path.stat().st_size == room


@pytest.mark.parametrize("error", [UserError("no"), SaveError("no"), NonFiniteError("no"), MachineError("node7", "no")])
def test_each_kind_of_end_leaves_its_own_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: UserError) -> None:
    def end(*_: object) -> None:
        raise error

    monkeypatch.setattr(pretrain, "carry_out", end)
    config = RunConfig(training=replace(RunConfig().training, outcome_file=str(tmp_path / "outcome")))
    with pytest.raises(UserError):
        pretrain.pretrain(config, None, 0.0)
    assert (
        tmp_path / "outcome"
    ).read_text() == f"{error.outcome} {'node7' if error.outcome == 'machine' else '-'} job -.0 {error}\n"


def test_the_last_step_is_saved_only_where_its_checkpoint_stands_and_the_tracker_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "from_rank_0", lambda look: look())
    with pytest.raises(SaveError, match="step 6, which is not saved .* no earlier"):
        run_module.refuse_unsaved(tmp_path, 6)
    for step in (3, 6):
        (tmp_path / f"iter_{step:07d}").mkdir()
        save_directory.write_tracker(tmp_path, 3)
    with pytest.raises(SaveError, match="iter_0000006 stands"):
        run_module.refuse_unsaved(tmp_path, 6)
    save_directory.write_tracker(tmp_path, 6)
    run_module.refuse_unsaved(tmp_path, 6)


def test_a_tracker_that_was_damaged_meanwhile_is_told_and_mended_or_the_run_is_unsaved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "from_rank_0", lambda look: look())
    tracker = tmp_path / save_directory.TRACKER
    tracker.write_text("rubbish")
    with pytest.raises(SaveError, match="step 6, which is not saved"):
        run_module.refuse_unsaved(tmp_path, 6)
    (tmp_path / "iter_0000006").mkdir()
    for damage in (lambda: tracker.write_bytes(b"\0\0"), tracker.unlink):
        damage()
        caplog.clear()
        run_module.refuse_unsaved(tmp_path, 6)
        assert tracker.read_text() == "6\n" and "written anew and names step 6" in caplog.text
    tracker.unlink()
    tracker.mkdir()  # which no write replaces
    with pytest.raises(SaveError, match="cannot be written: .*; step 6 is saved: --load .*iter_0000006"):
        run_module.refuse_unsaved(tmp_path, 6)

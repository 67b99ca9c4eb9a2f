"""inspect_checkpoint: the report names what is in a checkpoint; damaged files are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_salt.checkpoint import save_directory
from megatron_salt.checkpoint.run_state import ReferenceLosses, RunState, SaltState
from megatron_salt.errors import UserError
from megatron_salt.tools.inspect_checkpoint import InspectConfig, inspect_checkpoint
from tests.support.checkpoint_runs import TINY, Run, flip, job, start
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(1, job, Run(save=str(directory)), 1, 2, (1, 2), True)
    return directory


def test_the_report_says_what_was_saved(saved: Path, capsys: pytest.CaptureFixture) -> None:
    assert inspect_checkpoint(InspectConfig(load=str(saved), tensors=True, print_config=True, verify=True)) == 0
    report = capsys.readouterr().out
    assert "step         2, 32 samples" in report and "fully_reshardable, 2 updates" in report and "seed: 1234" in report
    h, ffn = TINY.hidden_size, TINY.ffn_width
    layer = 2 * h + h * (h + 2 * h // 2) + h * h + 3 * h * ffn
    assert f"parameters   {256 * h + 2 * layer + h:,} in 8 tensors, float32" in report
    assert "embedding.word_embeddings.weight" in report and "files are as written" in report
    assert "stage        no teacher" in report and "own loss     not recorded: it cannot be a teacher" in report


@pytest.mark.parametrize(
    "step, crossover, end, message",
    [
        (2, None, 5, "1; stage 1 ends after step 5\n"),
        (2, 2, 4, "1; stage 1 ends after step 4, because the student had passed its teacher at step 2\n"),
        (5, None, 5, "2; stage 1 ended after step 5\n"),
    ],
)
def test_the_report_says_in_which_stage_it_is_and_with_which_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture, step: int, crossover: int | None, end: int, message: str
) -> None:
    schedule = {"kd_steps": 5, "kd_weight": 0.5, "kd_transition": "step"}
    held_out = None if crossover is None else {"loss": 3.25, "accuracy": 0.5}
    salt = SaltState(
        stage1_end=end, schedule=schedule, teacher="sha256:abcd", teacher_directory="/teachers/one", crossover=crossover,
        teacher_held_out=held_out,
    )  # fmt: skip
    recorded = ReferenceLosses((16, 32), (5.5, None), "bfloat16")
    run_ranks(1, save_in_stage, Run(save=str(tmp_path)), RunState(step=step, consumed_samples=8 * step, salt=salt), recorded)
    assert inspect_checkpoint(InspectConfig(load=str(tmp_path))) == 0
    report = capsys.readouterr().out
    own = "5.50000 over 16, not finite over 32 tokens, bfloat16, computed by the run that saved it"
    assert f"stage        {message}" in report and f"own loss     {own}\n" in report
    assert "schedule     --kd-steps 5, --kd-weight 0.5, --kd-transition step" in report
    assert "teacher      sha256:abcd, then in /teachers/one" in report
    assert ("held out     the teacher's loss 3.25, accuracy 0.5" in report) == (held_out is not None)


def save_in_stage(run: Run, state: RunState, recorded: ReferenceLosses) -> None:
    _, checkpointer, _ = start(run, 1)
    checkpointer.save(state, recorded)


def test_damage_is_one_line_that_names_each_file(saved: Path) -> None:
    directory = save_directory.directory_of(saved, 1)
    flip(directory / "__0_0.distcp", 50)
    assert inspect_checkpoint(InspectConfig(load=str(directory))) == 0
    state = (directory / save_directory.STATE).read_bytes()
    (directory / save_directory.STATE).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        inspect_checkpoint(InspectConfig(load=str(directory), verify=True))
    (directory / save_directory.STATE).write_bytes(state)
    message = str(caught.value)
    assert str(directory / "__0_0.distcp") in message and str(directory / save_directory.STATE) in message
    assert "\n" not in message and caught.value.status == 2


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        inspect_checkpoint(InspectConfig(load=str(tmp_path)))

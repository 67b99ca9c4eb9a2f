"""The program as a user runs it: real processes, exit statuses, signals, and the cost of --help and of mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_salt import pretrain
from tests.support.program import (
    SMALL,
    argv,
    checkpoints,
    entries,
    numbers,
    run,
    start,
    tensors,
    the_error,
    train,
    wait_until,
    write_tokens,
)

WITHOUT_TORCH = """
import sys
from megatron_salt import pretrain
try:
    status = pretrain.main()
except SystemExit as leaving:
    status = leaving.code or 0
print(status, "torch" in sys.modules, "megatron" in sys.modules)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.mark.parametrize("words, status", [(["--help"], 0), (argv(global_batch_size=9, train_iters=1), 2), (["--sed", "1"], 2)])
def test_help_and_mistakes_in_flags_do_not_wait_for_torch(words: list[str], status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], text=True, capture_output=True, check=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == f"{status} False False"
    assert ended.stderr.count("\n") == (1 if status else 0), ended.stderr


def test_print_config_gives_a_file_that_asks_for_the_same_run(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        pretrain.main([*argv(data_path=data, train_iters=3, lr_decay_style="cosine"), "--print-config"])
    assert leaving.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    train(**dict.fromkeys(SMALL), config=tmp_path / "run.yaml", save=tmp_path / "file")
    train(data_path=data, train_iters=3, lr_decay_style="cosine", save=tmp_path / "flags")
    assert numbers(tmp_path / "file") == numbers(tmp_path / "flags")
    kept = tmp_path / "file" / "iter_0000003" / "run.yaml"  # what a checkpoint keeps can be run, too
    train(**dict.fromkeys(SMALL), config=kept, save=tmp_path / "kept")
    assert numbers(tmp_path / "kept") == numbers(tmp_path / "flags")


@pytest.mark.long
def test_a_process_that_is_told_to_leave_saves_and_exits_with_0(tmp_path: Path, data: str) -> None:
    """SIGTERM to the program itself. A later start continues the run."""
    flags = dict(data_path=data, train_iters=100_000, exit_signal_handler=True)
    process = start(**flags, save=tmp_path / "told")
    log = tmp_path / "told" / "train.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"kind": "step"') >= 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert out.splitlines()[-1].endswith("leaving: SIGTERM received")
    (left_at,) = checkpoints(tmp_path / "told")
    flags |= dict(exit_interval=left_at + 2)
    train(**flags, save=tmp_path / "told", load=tmp_path / "told")
    train(**flags, save=tmp_path / "left alone")
    assert numbers(tmp_path / "told") == numbers(tmp_path / "left alone")
    assert tensors(tmp_path / "told", left_at + 2) == tensors(tmp_path / "left alone", left_at + 2)


@pytest.mark.long
def test_a_signal_to_every_process_of_the_run_does_not_spoil_the_save(tmp_path: Path, data: str) -> None:
    """Slurm signals all processes of a job, also those that write a checkpoint in the background."""
    flags = dict(data_path=data, train_iters=100_000, exit_signal_handler=True, async_save=True, save_interval=3)
    process = start(**flags, save=tmp_path / "told")
    wait_until(lambda: len(list((tmp_path / "told").glob("iter_*"))) >= 2, process)  # the second is being written, or just was
    for _ in range(3):
        os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "failed" not in err, err
    assert out.splitlines()[-1].endswith("leaving: SIGTERM received")
    assert checkpoints(tmp_path / "told")[-1] == entries(tmp_path / "told")[-1]["step"]


@pytest.mark.long
def test_two_ranks_under_torchrun_report_a_mistake_once(tmp_path: Path, data: str) -> None:
    """Both ranks see it after they have joined: the checkpoint has another model."""
    train(data_path=data, train_iters=2, save=tmp_path)
    process = start(2, data_path=data, train_iters=4, load=tmp_path, num_layers=3, tensor_model_parallel_size=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    assert err.count("error: ") == 1 and "holds another architecture: --num-layers is 2 there and 3 here" in err
    assert "exitcode  : 2" in err and "megatron_salt/" not in err, err
    assert out == ""


@pytest.mark.long
def test_warnings_come_from_one_rank(tmp_path: Path, data: str) -> None:
    """Rank 0 prints what all ranks see; the last rank prints the progress."""
    train(2, data_path=data, train_iters=2, save=tmp_path)
    ended = run(2, data_path=data, train_iters=4, save=tmp_path, load=tmp_path)
    assert [one.status for one in ended] == [0, 0]
    assert [one.err.count("the run's length changed, and so does lr_decay_steps") for one in ended] == [1, 0]
    assert [one.err.count("step 4: saved ") for one in ended] == [0, 1], ended[0].err
    assert ended[0].out == "" and "step 4/4" in ended[1].out and the_error(ended[0].err) == ""

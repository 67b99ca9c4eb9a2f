"""score_data: a job that is killed, asked to leave or out of space continues when it is started again. The index is the same."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch.distributed as dist

from megatron_salt.salt import scorer
from tests.support.ranks import run_ranks
from tests.support.scoring import NUM_SAMPLES, Ended, argv, main, refused, same, score, table


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_job_goes_on_and_the_index_is_the_same(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, world_size: int
) -> None:
    """Kill -9 twice after some blocks, then finish with another number of replicas. Finished blocks are not scored again."""
    done = 0
    for stop in (2, 5):
        with contextlib.ExitStack() as stack:
            process = start(world_size, **score_flags, output=tmp_path / "index")
            stack.callback(kill, process)
            assert process.stdout is not None
            for line in process.stdout:
                if "finished before" in line:
                    assert finished_before(line) >= done
                if f": {stop - done} blocks, " in line:
                    break
            else:
                raise AssertionError("it ended before it could be killed")
        done = stop
    output = score(3 - world_size, **score_flags, output=tmp_path / "index")
    assert 5 <= finished_before(output) < 8, output
    assert same(table(tmp_path / "index"), table(score_index))


def interrupted(words: list[str], how: str) -> Ended:
    """In every rank: before its fifth microbatch the last rank gets a signal, or rank 0, which looks for it, makes the exit file."""
    from megatron_salt.salt.scorer import Scorer

    original, numbers = Scorer._microbatch, iter(range(1, 100))

    def microbatch(scorer: Scorer, ids: np.ndarray) -> Any:
        if next(numbers) == 5 and dist.get_rank() == (dist.get_world_size() - 1 if how == "signal" else 0):
            os.kill(os.getpid(), signal.SIGUSR1) if how == "signal" else Path(how).touch()
        return original(scorer, ids)

    with mock.patch.object(Scorer, "_microbatch", microbatch), mock.patch.object(scorer, "PIECE", 1):
        return main(words)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_job_that_is_told_to_leave_says_how_far_it_is_and_the_same_command_goes_on(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path, how: str, world_size: int
) -> None:
    """A block is 2 microbatches. Ranks ask before each round of microbatches whether to leave, and hear the answer before the next.

    One rank leaves in its fourth block. Two ranks have one microbatch of each block, so they leave after their sixth block.
    """
    file = tmp_path / "leave"
    score_flags = score_flags | dict(output=tmp_path / "index", exit_file=file)
    ended = run_ranks(world_size, interrupted, argv(**score_flags), "signal" if how == "signal" else str(file))
    assert [one.status for one in ended] == [3] * world_size, ended
    reason = "SIGUSR1 received" if how == "signal" else f"--exit-file {file} has appeared"
    output = "".join(one.out for one in ended)
    left = re.search(rf"left after (\d+) of {NUM_SAMPLES} windows: {reason}; the same command goes on\n", output)
    assert left and int(left[1]) == {1: 12, 2: 24}[world_size] and "finished:" not in output, output
    if how == "file":
        assert f"--exit-file {file} is there" in refused(world_size, **score_flags)
        file.unlink()
    assert finished_before(score(world_size, **score_flags)) == int(left[1]) // 4
    assert same(table(tmp_path / "index"), table(score_index))


def finished_before(output: str) -> int:
    """Number of finished blocks that a job reports at its start."""
    return int(output.partition(" of them finished before")[0].split()[-1])


def start(world_size: int, **flags: Any) -> subprocess.Popen[str]:
    """Start the tool in a process of its own, slowed down so that it can be killed before its end."""
    slowly = (
        "import sys, time; from megatron_salt.salt import scorer; whole = scorer.Scorer.score\n"
        "def score(*arguments):\n    time.sleep(0.3)\n    return whole(*arguments)\n"
        "scorer.Scorer.score = score\n"
        "from megatron_salt.cli import run_tool; from megatron_salt.tools.score_data import ScoreConfig, score_data\n"
        "sys.exit(run_tool(ScoreConfig, score_data, sys.argv[1:]))"
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
        "--no-python",
        sys.executable,
    ]
    return subprocess.Popen(
        [sys.executable, *(launcher if world_size > 1 else []), "-c", slowly, *argv(**flags)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and all processes that it started."""
    of = psutil.Process(process.pid)
    everyone = [of, *of.children(recursive=True)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everyone)


def test_a_part_is_resumed_as_it_was_begun(tmp_path: Path, score_flags: dict[str, Any], part_index: Path) -> None:
    for one in run_ranks(2, out_of_space, argv(**score_flags, output=tmp_path / "index", sample=0.4)):
        assert one.status == 2, one
    for changes, message in (
        (dict(sample=0.5), "sample is 0.4 there and 0.5 here"),
        (dict(), "sample is 0.4 there and None here"),
        (dict(sample=0.4, sample_seed=7), "sample seed is 1234 there and 7 here"),
    ):
        assert message in refused(**score_flags, output=tmp_path / "index", **changes)
    assert "2 of them finished before" in score(**score_flags, output=tmp_path / "index", sample=0.4)
    assert same(table(tmp_path / "index"), table(part_index))


def test_a_full_disk_ends_every_rank_and_keeps_what_is_finished(
    tmp_path: Path, score_flags: dict[str, Any], score_index: Path
) -> None:
    for one in run_ranks(2, out_of_space, argv(**score_flags, output=tmp_path / "index")):
        assert one.status == 2, one
    assert "cannot be written: No space left on device" in one.err and "finished blocks stay" in one.err
    assert "2 of them finished before" in score(**score_flags, output=tmp_path / "index")
    assert same(table(tmp_path / "index"), table(score_index))


def out_of_space(words: list[str]) -> Ended:
    """In every rank: writing the third block fails, as on a full disk."""
    from megatron_salt.selection.score_writer import ShardWriter

    whole = ShardWriter.write

    def write(writer: ShardWriter, block: int, rows: Any) -> None:
        if block == 2:
            raise OSError(28, "No space left on device", "mean.npy")
        whole(writer, block, rows)

    with mock.patch.object(ShardWriter, "write", write):
        return main(words)

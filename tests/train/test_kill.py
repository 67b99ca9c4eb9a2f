"""kill -9 at any moment of training and of saving: the run, started again, ends as if nothing had happened. Whole program."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

import pytest

from tests.program import DROPOUT, begin, checkpoints, losses, numbers, tensors, train, write_tokens

STEPS = 24
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(DROPOUT, async_save=True), marks=pytest.mark.full),
        pytest.param(1, dict(DROPOUT, bf16=True), id="dropout bf16"),
        pytest.param(2, dict(OVERLAP), marks=pytest.mark.full),
        pytest.param(2, dict(OVERLAP, async_save=True, keep_last=2), id="dp2 overlap async"),
    ],
)
def test_killed_at_random_moments_the_joined_curve_is_the_uninterrupted_one(
    tmp_path: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """Four kills: twice some moments after a save has begun, twice after a step; all ranks die. Then the run goes to its end."""
    flags = dict(flags, data_path=write_tokens(tmp_path / "words"), train_iters=STEPS, save_interval=3)
    train(world_size, **flags, save=tmp_path / "one")
    save, rng = tmp_path / "two", random.Random(world_size)
    flags = dict(flags, save=save, load=save)
    for wait in (until_saving, until_a_step, until_saving, until_a_step):
        processes = begin(tmp_path, world_size, **flags)
        wait(save, processes[0])
        time.sleep(rng.uniform(0.0, 0.25))
        for process in processes:
            kill(process)
    train(world_size, **flags)
    assert list(losses(save)) == list(range(1, STEPS + 1))
    assert numbers(save) == numbers(tmp_path / "one")
    assert tensors(save, STEPS) == tensors(tmp_path / "one", STEPS)
    assert checkpoints(save) == checkpoints(tmp_path / "one")
    assert not [path for path in save.iterdir() if path.suffix in (".partial", ".deleting", ".replaced", ".tmp")]


def kill(process: Process) -> None:
    """End a process and the writers that it started."""
    assert process.pid is not None
    for end in (os.killpg, os.kill):  # it may not have a group of its own yet
        with contextlib.suppress(ProcessLookupError):
            end(process.pid, signal.SIGKILL)
    process.join()


def until_saving(save: Path, process: Process) -> None:
    """Wait until a save has begun."""
    wait_until(lambda: any(save.glob("iter_*.partial")), process)


def until_a_step(save: Path, process: Process) -> None:
    """Wait until the log has grown."""
    path = save / "train.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    wait_until(lambda: path.exists() and path.stat().st_mtime_ns > before and '"step", "time"' in path.read_text()[-2000:], process)


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 120.0) -> None:
    """Wait until the condition holds; the process must still run by then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the run ended by itself with {process.exitcode}"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.002)

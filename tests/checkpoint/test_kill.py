"""The whole program under kill -9 at any moment of training and saving: started again, it ends as if nothing had happened."""

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

from tests.support.program import DROPOUT, begin, checkpoints, losses, numbers, tensors, train, write_tokens

STEPS = 60
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, dict(DROPOUT, async_save=True), marks=pytest.mark.full),
        pytest.param(1, dict(DROPOUT, bf16=True, log_interval=7), id="dropout bf16"),
        pytest.param(2, dict(OVERLAP), marks=pytest.mark.full),
        pytest.param(2, dict(OVERLAP, async_save=True, keep_last=2), id="dp2 overlap async"),
    ],
)
def test_killed_at_random_moments_the_joined_curve_is_the_uninterrupted_one(
    tmp_path: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """All ranks are killed four times, at a random time after the run has started to save or has logged a step."""
    flags = dict(flags, data_path=write_tokens(tmp_path / "words"), train_iters=STEPS)
    train(world_size, **flags, save=tmp_path / "one")
    save, rng = tmp_path / "two", random.Random(world_size)
    flags |= dict(save=save, load=save, save_interval=3)
    killed = 0
    for wait in (is_saving, has_logged, saves_again, has_logged):
        processes = begin(tmp_path, world_size, **flags)
        wait_until(wait(save), processes[0])
        time.sleep(rng.uniform(0.0, 0.15))
        killed += processes[0].is_alive()
        for process in processes:
            kill(process)
    assert killed >= 3
    train(world_size, **flags)
    assert list(losses(save)) == list(range(1, STEPS + 1))
    assert numbers(save) == numbers(tmp_path / "one")
    assert tensors(save, STEPS) == tensors(tmp_path / "one", STEPS)
    assert checkpoints(save) == ([STEPS - 3, STEPS] if "keep_last" in flags else list(range(3, STEPS + 1, 3)))
    assert not [path for path in save.iterdir() if path.suffix in (".partial", ".deleting", ".replaced", ".tmp")]


def is_saving(save: Path) -> Callable[[], bool]:
    """Whether a save has begun."""
    return lambda: any(save.glob("iter_*.partial"))


def saves_again(save: Path) -> Callable[[], bool]:
    """Whether the run has completed a save and begun the next one."""
    before = max(checkpoints(save), default=0)
    return lambda: max(checkpoints(save), default=0) > before and any(save.glob("iter_*.partial"))


def has_logged(save: Path) -> Callable[[], bool]:
    """Whether the run has completed a save and, after it, logged a step."""
    before = max(checkpoints(save), default=0)

    def ask() -> bool:
        newest = max(checkpoints(save), default=0)
        log = (save / "train.jsonl").read_text() if (save / "train.jsonl").exists() else ""
        return newest > before and f'"step": {newest + 1},' in log

    return ask


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 120.0) -> None:
    """Wait until the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.002)
    assert process.exitcode in (None, 0), "the run ended by itself"


def kill(process: Process) -> None:
    """End a process and the writers that it started."""
    assert process.pid is not None
    for end in (os.killpg, os.kill):  # it may not have a group of its own yet
        with contextlib.suppress(ProcessLookupError):
            end(process.pid, signal.SIGKILL)
    process.join()

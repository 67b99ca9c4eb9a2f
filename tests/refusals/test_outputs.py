"""Outputs that cannot be written, and a disk that fills up during a run."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_salt.train import loop
from tests.support.program import checkpoints, losses, refused, run, the_error, train


@pytest.mark.parametrize("flag", ["save", "jsonl", "tensorboard_dir"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_place_that_cannot_be_written(tmp_path: Path, data: str, flag: str, world_size: int) -> None:
    """The directory is a file. (Permissions stop nothing where tests run as root.)"""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "inside"
    message = refused(world_size, **(dict(data_path=data, train_iters=4, save=tmp_path / "save") | {flag: path}))
    assert f"--{flag.replace('_', '-')} {path} cannot be written: " in message, message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


def test_a_profile_needs_a_place(data: str) -> None:
    assert "--tensorboard-dir or --save" in refused(2, data_path=data, train_iters=4, profile=True)


@contextlib.contextmanager
def full_from_step_3_on(size: int) -> Iterator[None]:
    """On the last rank, from step 3 on, no file may grow beyond `size` bytes."""
    steps = iter(range(1, 100))

    def train_step(*arguments: Any) -> Any:
        if next(steps) == 3 and dist.get_rank() == dist.get_world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return original(*arguments)

    original = loop.train_step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with mock.patch.object(loop, "train_step", train_step):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room_for_a_shard() -> contextlib.AbstractContextManager[None]:
    return full_from_step_3_on(40_000)


def no_room_for_a_log() -> contextlib.AbstractContextManager[None]:
    return full_from_step_3_on(100)


@pytest.mark.long
@pytest.mark.parametrize(
    "world_size, flags",
    [(1, {}), (1, dict(async_save=True)), (2, dict(use_distributed_optimizer=True, async_save=True)), (2, {})],
)
def test_a_disk_that_fills_up_ends_the_run_or_not_and_the_last_good_checkpoint_stands(
    tmp_path: Path, data: str, world_size: int, flags: dict[str, Any]
) -> None:
    flags = dict(flags, data_path=data, train_iters=6, save_interval=2, tensor_model_parallel_size=world_size, hidden_size=64)
    ended = run(world_size, **flags, save=tmp_path / "stop", within=no_room_for_a_shard)
    assert [one.status for one in ended] == [3] * world_size, ended
    message = the_error(ended[0].err)
    words = ["saving step 4", f"--save {tmp_path / 'stop'}", "GiB free", "iter_0000002 stands", "--on-save-error continue"]
    assert all(word in message for word in words), message
    assert checkpoints(tmp_path / "stop") == [2]
    assert sorted(path.name for path in (tmp_path / "stop").iterdir()) == [
        "iter_0000002", "latest_checkpointed_iteration.txt", "tensorboard", "train.jsonl"]  # fmt: skip

    ended = run(world_size, **flags, save=tmp_path / "go on", on_save_error="continue", within=no_room_for_a_shard)
    assert [one.status for one in ended] == [3] * world_size, ended  # the last step is done, but not saved
    assert "the run ended at step 6, which is not saved" in ended[0].err and "iter_0000002 stands" in ended[0].err
    assert sum(one.err.count("saving step 4") for one in ended) == sum(one.err.count("saving step 6") for one in ended) == 1
    assert checkpoints(tmp_path / "go on") == [2] and losses(tmp_path / "go on").keys() == {1, 2, 3, 4, 5, 6}
    for name in ("stop", "go on"):
        train(world_size, **flags, save=tmp_path / name, load=tmp_path / name)
    assert losses(tmp_path / "go on") == losses(tmp_path / "stop")


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=4, jsonl=tmp_path / "log.jsonl", tensorboard_dir=tmp_path)
    (ended,) = run(1, **flags, within=no_room_for_a_log)
    assert ended.status == 0 and "step 4/4" in ended.out
    assert [ended.err.count(f"warning: {flag} cannot be written") for flag in ("--jsonl", "--tensorboard-dir")] == [1, 1], (
        ended.err
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_bytes().splitlines()]
    assert steps[-1] == 2

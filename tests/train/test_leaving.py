"""A run leaves early: after a signal, an exit file, a time limit or at a step, on all ranks, in every phase. Whole program."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_salt.checkpoint import sharded_state
from megatron_salt.config import RunConfig
from megatron_salt.salt import load_teacher
from megatron_salt.train import build, evaluate, loop
from megatron_salt.train import run as run_module
from megatron_salt.train.inputs import Inputs
from tests.support.program import (
    checkpoints,
    entries,
    numbers,
    refused,
    run,
    state_of,
    tensors,
    train,
    write_tokens,
)  # fmt: skip

OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.mark.parametrize(
    "world_size, flags, told",
    [
        (1, dict(exit_interval=1), "step 1 is a multiple of --exit-interval 1"),
        (2, dict(exit_duration_in_mins=0), "--exit-duration-in-mins 0.0 is over"),
    ],
)
def test_a_run_that_leaves_early_has_saved(
    tmp_path: Path, data: str, world_size: int, flags: dict[str, Any], told: str
) -> None:
    """After the step of --exit-interval; for any other reason after the step that follows it, when all ranks have heard of it."""
    ended = train(world_size, data_path=data, train_iters=5, save=tmp_path, **flags)
    assert f"leaving: {told}" in ended.out and checkpoints(tmp_path) == [1 if "exit_interval" in flags else 2]
    assert entries(tmp_path, "event")[-1]["message"] == f"leaving: {told}"


@contextlib.contextmanager
def signal_to_rank_1_in_step_3() -> Iterator[None]:
    """Only one of the ranks gets the signal."""
    steps = iter(range(1, 100))

    def train_step(*arguments: Any) -> Any:
        if next(steps) == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    original = loop.train_step
    with mock.patch.object(loop, "train_step", train_step):
        yield


@pytest.mark.parametrize("async_save", [False, True])
def test_all_ranks_leave_when_one_gets_a_signal_and_the_run_goes_on_later(tmp_path: Path, data: str, async_save: bool) -> None:
    flags = dict(data_path=data, train_iters=5, exit_signal_handler=True, async_save=async_save, **OVERLAP)
    ended = train(2, **flags, save=tmp_path / "two", save_interval=2, within=signal_to_rank_1_in_step_3)
    assert "leaving: SIGTERM received" in ended.out and checkpoints(tmp_path / "two") == [2, 4]
    train(2, **flags, save=tmp_path / "two", load=tmp_path / "two")
    train(2, **flags, save=tmp_path / "one")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    assert tensors(tmp_path / "two", 5) == tensors(tmp_path / "one", 5)


@contextlib.contextmanager
def signal_to_rank_1_while(module: Any, name: str) -> Iterator[None]:
    """Only one of the ranks gets the signal, before the first step."""

    def action(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    original = getattr(module, name)
    with mock.patch.object(module, name, action):
        yield


@contextlib.contextmanager
def signal_while_the_model_is_built() -> Iterator[None]:
    with signal_to_rank_1_while(build, "build_student"):
        yield


@contextlib.contextmanager
def signal_while_tensors_are_loaded() -> Iterator[None]:
    with signal_to_rank_1_while(sharded_state, "load"):
        yield


@contextlib.contextmanager
def signal_while_the_teacher_is_checked() -> Iterator[None]:
    with signal_to_rank_1_while(load_teacher, "fused_linear_cross_entropy"):
        yield


def test_all_ranks_leave_before_the_first_step_when_one_gets_a_signal_by_then(tmp_path: Path, data: str) -> None:
    """Nothing is saved, logged or lost. --outcome-file names the step, and the next start goes on."""
    flags = dict(data_path=data, exit_signal_handler=True, outcome_file=tmp_path / "outcome")
    flags |= dict(save=tmp_path / "run", load=tmp_path / "run")
    train(2, **flags, train_iters=2)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    going_on = dict(flags, train_iters=4)
    teaching = dict(flags, train_iters=4, teacher_load=tmp_path / "run", kd_steps=4, save=tmp_path / "new", load=None)
    for within, more, where in (
        (signal_while_the_model_is_built, going_on, "the first step of this start: SIGTERM received while building the model"),
        (signal_while_tensors_are_loaded, going_on, "step 3: SIGTERM received while loading the checkpoint"),
        (signal_while_tensors_are_loaded, teaching, "step 1: SIGTERM received while loading the teacher"),
        (signal_while_the_teacher_is_checked, teaching, "step 1: SIGTERM received while checking the teacher"),
    ):
        (tmp_path / "outcome").unlink()
        ended = run(2, **more, within=within)
        assert [one.status for one in ended] == [0, 0]
        assert f"before {where}" in (tmp_path / "outcome").read_text()
        assert (tmp_path / "outcome").read_text().startswith("left ")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before and not checkpoints(tmp_path / "new")
    train(2, **going_on)
    assert checkpoints(tmp_path / "run") == [2, 4] and len(entries(tmp_path / "run")) == 4


@contextlib.contextmanager
def a_file_appears_in_step_2(file: Path) -> Iterator[None]:
    steps = iter(range(1, 100))

    def train_step(*arguments: Any) -> Any:
        if next(steps) == 2 and dist.get_rank() == 0:  # another rank may be one step ahead of the one that looks
            file.touch()
        return original(*arguments)

    original = loop.train_step
    with mock.patch.object(loop, "train_step", train_step):
        yield


def test_all_ranks_leave_when_the_exit_file_appears_and_a_start_that_finds_it_is_refused(tmp_path: Path, data: str) -> None:
    file, save = tmp_path / "leave", tmp_path / "save"
    flags = dict(data_path=data, train_iters=4, exit_file=file, save=save, outcome_file=tmp_path / "outcome")
    ended = train(2, **flags, within=partial(a_file_appears_in_step_2, file))
    assert f"leaving: --exit-file {file} has appeared" in ended.out and checkpoints(save) == [3]
    assert file.exists() and (tmp_path / "outcome").read_text().startswith("left 3 ")
    for dry_run in (None, 1):
        assert f"--exit-file {file} is there" in refused(**flags, load=save, dry_run=dry_run)
    file.unlink()
    train(2, **flags, load=save)
    assert checkpoints(save) == [3, 4]


@contextlib.contextmanager
def a_file_appears_while_the_data_is_opened(file: Path) -> Iterator[None]:
    """The exit file appears in the first seconds of the program."""
    original = run_module.read_inputs

    def read_inputs(config: RunConfig) -> Inputs:
        file.touch()
        return original(config)

    with mock.patch.object(run_module, "read_inputs", read_inputs):
        yield


def test_an_exit_file_that_appears_while_the_run_starts_is_a_reason_to_leave_and_no_mistake(tmp_path: Path, data: str) -> None:
    file, outcome = tmp_path / "leave", tmp_path / "outcome"
    flags = dict(data_path=data, train_iters=4, exit_file=file, save=tmp_path / "save", outcome_file=outcome)
    train(1, **flags, within=partial(a_file_appears_while_the_data_is_opened, file))
    assert outcome.read_text().startswith("left - ") and f"--exit-file {file} has appeared" in outcome.read_text()
    assert not (tmp_path / "save").exists()


AT_STEP_2 = dict(eval_interval=2, no_eval_at_start=True)


@contextlib.contextmanager
def signal_to_rank_1_in_the_evaluation() -> Iterator[None]:
    """Only one of the ranks gets the signal, in the third batch of its first evaluation."""
    batches = iter(range(1, 100))

    def forward_input(*arguments: Any) -> Any:
        if next(batches) == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    original = evaluate.forward_input
    with mock.patch.object(evaluate, "forward_input", forward_input):
        yield


def test_a_signal_cuts_an_evaluation_short_and_a_resumed_run_begins_with_it(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=4, exit_signal_handler=True, valid_share=0.2, **AT_STEP_2, eval_iters=20)
    two, one = tmp_path / "two", tmp_path / "one"
    ended = train(2, **flags, save=two, save_interval=3, within=signal_to_rank_1_in_the_evaluation)
    assert re.search(r"evaluation cut short after [1-5] of 20 batches: SIGTERM received", ended.out) and not entries(
        two, "eval"
    )
    assert "leaving: SIGTERM received" in ended.out and checkpoints(two) == [2] and state_of(two, 2)["extra"]["evaluation_due"]
    train(2, **flags, save=two, load=two)
    train(2, **flags, save=one)
    evaluations = [[(entry["step"], entry["loss"]) for entry in entries(save, "eval")] for save in (two, one)]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[0]] == [2, 4]
    assert numbers(two) == numbers(one) and tensors(two, 4) == tensors(one, 4)
    assert decided(two, 2).exists() and decided(two, 4).exists()  # made after the saves


def test_a_run_whose_last_evaluation_was_cut_short_is_not_done(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=2, exit_signal_handler=True, valid_share=0.2, **AT_STEP_2, eval_iters=20)
    flags |= dict(save=tmp_path / "run", load=tmp_path / "run", outcome_file=tmp_path / "outcome")
    train(2, **flags, within=signal_to_rank_1_in_the_evaluation)
    assert (tmp_path / "outcome").read_text().startswith("left 2 ") and checkpoints(tmp_path / "run") == [2]
    train(2, **flags)
    assert (tmp_path / "outcome").read_text().startswith("done 2 ")
    assert [entry["step"] for entry in entries(tmp_path / "run", "eval")] == [2]


def decided(save: Path, step: int) -> Path:
    """The file in which a checkpoint holds the result of the evaluation after it."""
    return save / f"iter_{step:07d}" / "evaluated.json"


def test_a_chain_of_runs_that_are_too_short_for_an_evaluation_makes_progress(tmp_path: Path, data: str) -> None:
    """The time limit waits for the evaluation that a run begins with, and for its first step."""
    flags = dict(data_path=data, train_iters=4, exit_duration_in_mins=0, valid_share=0.2, **AT_STEP_2, eval_iters=3)
    assert "evaluation cut short after 0 of 3 batches: --exit-duration-in-mins 0.0 is over" in train(**flags, save=tmp_path).out
    train(**flags, save=tmp_path, load=tmp_path)
    assert checkpoints(tmp_path) == [2, 4] and [entry["step"] for entry in entries(tmp_path, "eval")] == [2]
    train(**flags, save=tmp_path, load=tmp_path)
    assert [entry["step"] for entry in entries(tmp_path, "eval")] == [2, 4]

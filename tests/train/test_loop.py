"""What the loop does besides steps: evaluate, log, save, leave, profile, survive gradients that are not finite. Whole program."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_salt.checkpoint import sharded_state
from megatron_salt.config import RunConfig
from megatron_salt.data.batch import Batches, Microbatch
from megatron_salt.metrics.run_log import STEP_KEYS
from megatron_salt.salt import load_teacher
from megatron_salt.train import build, evaluate, loop
from megatron_salt.train import run as run_module
from megatron_salt.train.inputs import Inputs
from tests.support.program import (
    DROPOUT,
    GLOBAL_BATCH,
    NUM_WINDOWS,
    SEQ_LENGTH,
    checkpoints,
    entries,
    losses,
    numbers,
    refused,
    run,
    state_of,
    tensors,
    the_error,
    train,
    write_tokens,
)  # fmt: skip

OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A plain run of 5 steps on one rank."""
    save = tmp_path_factory.mktemp("five")
    train(data_path=data, train_iters=5, save=save, **DROPOUT)
    return save


# ---- what it writes -----------------------------------------------------------------------------------------------------


def test_every_step_is_in_the_jsonl_with_the_time_of_its_phases(five_steps: Path) -> None:
    steps = entries(five_steps)
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    for entry in steps:
        assert set(entry) == set(STEP_KEYS)
        assert {"data", "forward-backward", "optimizer"} <= entry["phases"].keys() <= {
            "data", "forward-backward", "optimizer", "eval", "save"}  # fmt: skip
        inside = sum(entry["phases"][name] for name in ("data", "forward-backward", "optimizer"))
        assert 0.5 * entry["seconds"] < inside <= entry["seconds"]
        assert entry["tokens"] == GLOBAL_BATCH * SEQ_LENGTH and not entry["nonfinite"]
    events = " ".join(entry["message"] for entry in entries(five_steps, "event"))
    assert "parameters on 1 ranks" in events
    assert f"40 samples take 40 from the train data, which has {NUM_WINDOWS}: 18 are repeats" in events


def test_log_interval_thins_the_lines_and_nothing_else(tmp_path: Path, data: str, five_steps: Path) -> None:
    ended = train(data_path=data, train_iters=5, save=tmp_path, log_interval=2, **DROPOUT)
    assert [line.split()[1] for line in ended.out.splitlines() if "tokens/s" in line] == ["2/5", "4/5", "5/5"]
    assert numbers(tmp_path) == numbers(five_steps)


def test_tensorboard_holds_the_same_curve(five_steps: Path) -> None:
    events = EventAccumulator(str(five_steps / "tensorboard"))
    events.Reload()
    assert {scalar.step: scalar.value for scalar in events.Scalars("train/loss")} == pytest.approx(losses(five_steps))
    assert {"train/grad_norm", "train/lr", "time/optimizer"} <= set(events.Tags()["scalars"])


def test_what_only_looks_on_changes_no_bit(tmp_path: Path, data: str, five_steps: Path) -> None:
    """Evaluation, saving, garbage collection and profiling."""
    watched = dict(
        save_interval=2, manual_gc=True, manual_gc_interval=2, profile=True, profile_step_start=2, profile_step_end=4
    )
    seen = dict(valid_data_path=data, allow_valid_in_train=True)
    train(data_path=data, train_iters=5, save=tmp_path, eval_iters=1, eval_interval=2, **seen, **watched, **DROPOUT)
    assert numbers(tmp_path) == numbers(five_steps)
    assert tensors(tmp_path, 5) == tensors(five_steps, 5)
    assert [(entry["step"], entry["name"]) for entry in entries(tmp_path, "eval")] == [(step, "valid") for step in (2, 4, 5)]
    (trace,) = (tmp_path / "tensorboard").glob("*.pt.trace.json.gz")
    assert trace.name == "rank0.steps2-3.pt.trace.json.gz"
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


@pytest.mark.parametrize("world_size, flags", [(1, {}), (2, dict(tensor_model_parallel_size=2)), (2, OVERLAP)])
def test_the_held_out_loss_is_the_loss_on_that_data_without_dropout(
    tmp_path: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """At learning rate 0 on as many windows as a batch has, a training step sees the same data with the same weights."""
    data = write_tokens(tmp_path / "few", windows=GLOBAL_BATCH)
    flags = dict(flags, data_path=data, valid_data_path=data, train_iters=2, lr=0, lr_warmup_iters=0, eval_iters=2, eval_interval=1,
                 allow_valid_in_train=True)  # fmt: skip
    train(world_size, **flags, save=tmp_path / "plain")
    train(world_size, **flags, **DROPOUT, save=tmp_path / "dropout")
    expected = losses(tmp_path / "plain")[1]
    assert losses(tmp_path / "dropout")[1] != pytest.approx(expected, abs=1e-4)
    for name in ("plain", "dropout"):
        for entry in entries(tmp_path / name, "eval"):
            assert entry["loss"] == pytest.approx(expected, abs=3e-6)
            assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
            assert entry["tokens"] == 2 * GLOBAL_BATCH * SEQ_LENGTH


@pytest.mark.long
def test_the_named_ranks_profile(tmp_path: Path, data: str) -> None:
    train(2, data_path=data, train_iters=3, tensorboard_dir=tmp_path, profile=True, profile_step_start=3, profile_step_end=9,
          profile_ranks=[1])  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.gz")] == ["rank1.steps3-3.pt.trace.json.gz"]


# ---- when it saves and leaves -------------------------------------------------------------------------------------------


def test_checkpoints_come_at_the_interval_and_at_the_end_and_the_last_ones_stay(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=5, save_interval=1, use_distributed_optimizer=True)
    train(**flags, save=tmp_path, keep_last=2)
    assert checkpoints(tmp_path) == [4, 5]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    assert [state_of(tmp_path, step)["optimizer"]["form"] for step in (4, 5)] == ["dp_reshardable", "fully_reshardable"]


@pytest.mark.long
@pytest.mark.parametrize("async_save", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_step_of_save_at_stays_and_loads_under_any_layout(tmp_path: Path, data: str, async_save: bool) -> None:
    """Where a save is due at that step anyway, there is one save."""
    flags = dict(data_path=data, train_iters=5, use_distributed_optimizer=True)
    ended = train(**flags, save=tmp_path / "kept", save_interval=2, save_at=[1, 2], keep_last=1, async_save=async_save)
    assert checkpoints(tmp_path / "kept") == [1, 2, 5]
    assert [ended.err.count(f"step {step}: saved") for step in range(1, 6)] == [1, 1, 0, 1, 1]
    states = [state_of(tmp_path / "kept", step) for step in (1, 2, 5)]
    assert [state["name"] for state in states] == ["save-at", "save-at", None]
    assert {state["optimizer"]["form"] for state in states} == {"fully_reshardable"}
    for step in (1, 2):
        save = tmp_path / str(step)
        train(2, **flags, load=tmp_path / "kept" / f"iter_{step:07d}", save=save, tensor_model_parallel_size=2)
        assert losses(save) == pytest.approx(
            {at: loss for at, loss in losses(tmp_path / "kept").items() if at > step}, abs=3e-6
        )


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
    ended = train(world_size, data_path=data, train_iters=5, save=tmp_path, **flags)
    assert f"leaving: {told}" in ended.out and checkpoints(tmp_path) == [1]
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
    assert "leaving: SIGTERM received" in ended.out and checkpoints(tmp_path / "two") == [2, 3]
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
        if next(steps) == 2:
            file.touch()
        return original(*arguments)

    original = loop.train_step
    with mock.patch.object(loop, "train_step", train_step):
        yield


def test_all_ranks_leave_when_the_exit_file_appears_and_a_start_that_finds_it_is_refused(tmp_path: Path, data: str) -> None:
    file, save = tmp_path / "leave", tmp_path / "save"
    flags = dict(data_path=data, train_iters=4, exit_file=file, save=save, outcome_file=tmp_path / "outcome")
    ended = train(2, **flags, within=partial(a_file_appears_in_step_2, file))
    assert f"leaving: --exit-file {file} has appeared" in ended.out and checkpoints(save) == [2]
    assert file.exists() and (tmp_path / "outcome").read_text().startswith("left 2 ")
    for dry_run in (None, 1):
        assert f"--exit-file {file} is there" in refused(**flags, load=save, dry_run=dry_run)
    file.unlink()
    train(2, **flags, load=save)
    assert checkpoints(save) == [2, 4]


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


def test_samples_that_are_left_out_are_logged(tmp_path: Path, data: str) -> None:
    ended = train(data_path=data, train_iters=2, save=tmp_path, skip_samples=["8:16", "16:17"])
    line = "--skip-samples 8:16 16:17 leaves 9 samples of the order out"
    assert ended.out.count(line) == 1
    [event] = [event for event in entries(tmp_path, "event") if event["message"] == line]
    assert event["skip_samples"] == [[8, 16], [16, 17]] and event["step"] == 0


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
    flags = dict(data_path=data, train_iters=4, exit_signal_handler=True, valid_share=0.2, eval_interval=2, eval_iters=20)
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


def decided(save: Path, step: int) -> Path:
    """The file in which a checkpoint holds the result of the evaluation after it."""
    return save / f"iter_{step:07d}" / "evaluated.json"


@pytest.mark.parametrize("async_save", [False, True])
def test_every_save_comes_before_the_evaluation_and_is_told_of_it_afterwards(
    tmp_path: Path, data: str, async_save: bool
) -> None:
    """Also the last one. A run that was killed between its last save and last evaluation evaluates once at the next start."""
    flags = dict(data_path=data, train_iters=4, valid_share=0.2, eval_interval=2, eval_iters=1, async_save=async_save)
    flags |= dict(save=tmp_path / "run", load=tmp_path / "run", outcome_file=tmp_path / "outcome")
    save = tmp_path / "run"
    train(1, **flags, save_interval=1)
    assert [state_of(save, step)["extra"]["evaluation_due"] for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert [decided(save, step).exists() for step in (1, 2, 3, 4)] == [False, True, False, True]
    (once,) = [entry["loss"] for entry in entries(save, "eval") if entry["step"] == 4]
    for killed in (True, False):  # before its last evaluation was made, and after
        if killed:
            decided(save, 4).unlink()
        train(1, **flags)
        assert (tmp_path / "outcome").read_text().startswith("done 4 ")
        assert [entry["loss"] for entry in entries(save, "eval") if entry["step"] == 4] == [once, once]


def test_a_run_whose_last_evaluation_was_cut_short_is_not_done(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=2, exit_signal_handler=True, valid_share=0.2, eval_interval=2, eval_iters=20)
    flags |= dict(save=tmp_path / "run", load=tmp_path / "run", outcome_file=tmp_path / "outcome")
    train(2, **flags, within=signal_to_rank_1_in_the_evaluation)
    assert (tmp_path / "outcome").read_text().startswith("left 2 ") and checkpoints(tmp_path / "run") == [2]
    train(2, **flags)
    assert (tmp_path / "outcome").read_text().startswith("done 2 ")
    assert [entry["step"] for entry in entries(tmp_path / "run", "eval")] == [2]


def test_a_garbled_word_about_an_evaluation_is_refused_by_name(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=2, valid_share=0.2, eval_interval=2, eval_iters=1, save=tmp_path, load=tmp_path)
    train(1, **flags)
    whole = decided(tmp_path, 2).read_bytes()
    for content in (b"", b"{}", b"[1]", whole.replace(b'"step": 2', b'"step": 1')):
        decided(tmp_path, 2).write_bytes(content)
        assert f"{decided(tmp_path, 2)}: cannot be read" in refused(1, **flags)


# ---- gradients that are not finite --------------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_from(first: int, last: int) -> Iterator[None]:
    """A NaN in the second microbatch of the last rank, in steps [first, last]."""

    def fetch(self: Batches, consumed: int) -> list[Microbatch]:
        microbatches = original(self, consumed)
        if first <= consumed // GLOBAL_BATCH + 1 <= last and dist.get_rank() == dist.get_world_size() - 1:
            microbatches[1].loss_mask[0, 3] = torch.nan
        return microbatches

    original = Batches.fetch
    with mock.patch.object(Batches, "fetch", fetch):
        yield


@contextlib.contextmanager
def nan_in_step_3() -> Iterator[None]:
    with nan_from(3, 3):
        yield


@contextlib.contextmanager
def nan_from_step_3_on() -> Iterator[None]:
    with nan_from(3, 99):
        yield


@pytest.mark.parametrize(
    "flags", [dict(OVERLAP), dict(OVERLAP, bf16=True), dict(bf16=True), dict(tensor_model_parallel_size=2, bf16=True)]
)
def test_a_step_without_a_finite_gradient_changes_no_parameter(tmp_path: Path, data: str, flags: dict[str, Any]) -> None:
    """The loss of the next step is that of a run that never saw the batch. Learning rate and data advance."""
    flags = dict(flags, data_path=data, train_iters=5)
    train(2, **flags, save=tmp_path / "nan", within=nan_in_step_3)
    train(2, **flags, save=tmp_path / "skip", skip_samples=f"{2 * GLOBAL_BATCH}:{3 * GLOBAL_BATCH}")
    curve, other = entries(tmp_path / "nan"), entries(tmp_path / "skip")
    assert [entry["nonfinite"] for entry in curve] == [False, False, True, False, False]
    assert curve[2]["loss"] is None and curve[2]["grad_norm"] is None
    assert (curve[3]["loss"], curve[3]["grad_norm"]) == (other[2]["loss"], other[2]["grad_norm"])
    assert [(entry["lr"], entry["consumed_samples"]) for entry in curve] == [
        (entry["lr"], entry["consumed_samples"]) for entry in other
    ]
    assert math.isfinite(curve[4]["loss"])


def test_too_many_of_them_in_a_row_end_the_run_naming_step_rank_and_microbatch(tmp_path: Path, data: str) -> None:
    """Steps are counted across a resume too, and the checkpoint before them stays."""
    flags = dict(OVERLAP, data_path=data, train_iters=9, max_nonfinite_steps=3, save=tmp_path)
    ended = run(2, **flags, save_interval=2, within=nan_from_step_3_on)
    message = the_error(ended[0].err)
    assert [one.status for one in ended] == [4, 4]
    told = (
        "3 steps in a row",
        "--max-nonfinite-steps 3",
        "step 5",
        "rank 1, microbatch 1 (samples ",
        "Parameters are those of step 2",
        f"{tmp_path}/iter_0000002 stands",
        "--skip-samples 16:40",
    )
    assert all(word in message for word in told), message
    assert "microbatch 0" not in message and checkpoints(tmp_path) == [2, 4]
    ended = run(2, **flags, load=tmp_path, within=nan_from_step_3_on)
    assert [one.status for one in ended] == [4, 4] and "step 5: rank 1" in the_error(ended[0].err)
    assert losses(tmp_path).keys() == {1, 2, 3, 4}  # the log ends with the last step that was carried out
    train(2, **flags, load=tmp_path)
    assert [entry["nonfinite"] for entry in entries(tmp_path)] == [False, False, True, True] + 5 * [False]

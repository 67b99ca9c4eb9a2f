"""What the loop does besides steps: evaluate, log, save, profile. Whole program."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_salt.data.batch import Batches
from megatron_salt.errors import UserError
from megatron_salt.metrics.run_log import STEP_KEYS
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
    state_of,
    tensors,
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
    assert [(entry["step"], entry["name"]) for entry in entries(tmp_path, "eval")] == [(step, "valid") for step in (0, 2, 4, 5)]
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


def test_samples_that_are_left_out_are_logged(tmp_path: Path, data: str) -> None:
    ended = train(data_path=data, train_iters=2, save=tmp_path, skip_samples=["8:16", "16:17"])
    line = "--skip-samples 8:16 16:17 leaves 9 samples of the order out"
    assert ended.out.count(line) == 1
    [event] = [event for event in entries(tmp_path, "event") if event["message"] == line]
    assert event["skip_samples"] == [[8, 16], [16, 17]] and event["step"] == 0


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


def test_a_garbled_word_about_an_evaluation_is_refused_by_name(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=2, valid_share=0.2, eval_interval=2, eval_iters=1, save=tmp_path, load=tmp_path)
    train(1, **flags)
    whole = decided(tmp_path, 2).read_bytes()
    for content in (b"", b"{}", b"[1]", whole.replace(b'"step": 2', b'"step": 1')):
        decided(tmp_path, 2).write_bytes(content)
        assert f"{decided(tmp_path, 2)}: cannot be read" in refused(1, **flags)


@contextlib.contextmanager
def data_unusable_in_step_3() -> Iterator[None]:
    """Reading step 3 fails, one step before it is needed. No thread is left when the program has ended."""

    def fetch(batches: Batches, consumed: int) -> Any:
        if consumed == 2 * GLOBAL_BATCH:
            raise UserError("--data-path words: token id 300 at window 7")
        return original(batches, consumed)

    original = Batches.fetch
    with mock.patch.object(Batches, "fetch", fetch):
        yield
    assert not [thread.name for thread in threading.enumerate() if "reader of the next step" in thread.name]


def test_data_that_cannot_be_used_ends_the_run_in_the_step_that_needs_it(tmp_path: Path, data: str) -> None:
    line = refused(1, data_path=data, train_iters=5, save=tmp_path, save_interval=2, within=data_unusable_in_step_3)
    assert line.strip() == "--data-path words: token id 300 at window 7"
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2] and checkpoints(tmp_path) == [2]

"""The whole program: a resumed run equals the uninterrupted one bit for bit; what a run may change when it resumes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_salt.data.batch import Batches, Microbatch
from tests.support.checkpoint_runs import flip
from tests.support.program import (
    DROPOUT,
    GLOBAL_BATCH,
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
from tests.support.ranks import RankError

SHARDED = dict(use_distributed_optimizer=True)
OVERLAP = dict(SHARDED, overlap_grad_reduce=True, overlap_param_gather=True)
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
VP2 = dict(PP2, num_virtual_stages_per_pipeline_rank=2, num_layers=4)
ROUNDING = dict(rel=0, abs=3e-6)  # nats, of losses around 5: another order of the same sums


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A run of 6 steps on one rank that saved steps 2, 4 and 6, to resume from."""
    save = tmp_path_factory.mktemp("six")
    train(data_path=data, train_iters=6, save=save, save_interval=2, **SHARDED)
    return save


def resume(original: Path, step: int, save: Path, world_size: int = 1, **flags: Any) -> Path:
    """Continue `original` from one of its checkpoints to its sixth step, under another --save."""
    train(world_size, **(dict(train_iters=6) | flags), load=original / f"iter_{step:07d}", save=save)
    return save


@pytest.mark.parametrize(
    "world_size, flags",
    [
        pytest.param(1, DROPOUT, id="dropout"),
        pytest.param(1, dict(SHARDED, **DROPOUT, bf16=True, async_save=True), id="dropout bf16 async"),
        pytest.param(2, dict(OVERLAP, bf16=True), id="dp2 overlap bf16"),
        pytest.param(2, dict(OVERLAP, async_save=True, **DROPOUT), id="dp2 overlap async dropout"),
        pytest.param(2, DROPOUT, id="dp2 replicated optimizer", marks=pytest.mark.full),
        pytest.param(2, dict(TP2, **SHARDED, **DROPOUT), id="tp2"),
        pytest.param(2, dict(VP2, **SHARDED, bf16=True), id="pp2vp2 bf16"),
        pytest.param(2, dict(SHARDED, context_parallel_size=2), id="cp2", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **PP2, **SHARDED, **DROPOUT), id="tp2pp2"),
        pytest.param(4, dict(TP2, **OVERLAP, bf16=True), id="tp2dp2 overlap bf16", marks=pytest.mark.full),
        pytest.param(4, dict(TP2, **VP2, **OVERLAP, async_save=True), id="tp2pp2vp2 overlap async", marks=pytest.mark.full),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, data: str, world_size: int, flags: dict[str, Any]) -> None:
    """Every number of the log, and the last checkpoint's files: weights, optimizer and random state. Step 3 ends an epoch."""
    train(world_size, data_path=data, train_iters=5, save=tmp_path / "one", save_interval=2, **flags)
    resume(tmp_path / "one", 2, tmp_path / "two", world_size, **(dict(flags, data_path=data, train_iters=5, save_interval=2)))
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")[2:]
    assert len(tensors(tmp_path / "one", 5)) == world_size
    for step in (4, 5):
        assert tensors(tmp_path / "two", step) == tensors(tmp_path / "one", step)
    assert state_of(tmp_path / "two", 5)["consumed_samples"] == 5 * GLOBAL_BATCH


@pytest.mark.long
def test_leaving_after_every_step_changes_nothing(tmp_path: Path, data: str, six_steps: Path) -> None:
    """Six programs of one step each, in one directory: one log, one curve."""
    for _ in range(6):
        train(data_path=data, train_iters=6, save=tmp_path, load=tmp_path, exit_interval=1, **SHARDED)
    assert numbers(tmp_path) == numbers(six_steps)
    assert tensors(tmp_path, 6) == tensors(six_steps, 6)
    ended = train(data_path=data, train_iters=6, save=tmp_path, load=tmp_path, **SHARDED)
    assert "nothing to train: 6 steps are done, and the run has 6" in ended.out
    assert numbers(tmp_path) == numbers(six_steps)


@pytest.mark.parametrize(
    "world_size, flags",
    [(1, dict(micro_batch_size=1)), (1, dict(micro_batch_size=8)), (2, {}), (2, dict(micro_batch_size=4, loss_chunk_tokens=7))],
)
def test_micro_batch_and_replicas_may_change(
    tmp_path: Path, data: str, six_steps: Path, world_size: int, flags: dict[str, Any]
) -> None:
    """The samples stay, so the losses stay to rounding; also after a return to the old sizes."""
    resume(six_steps, 2, tmp_path / "other", world_size, data_path=data, exit_interval=4, **flags, **SHARDED)
    resume(tmp_path / "other", 4, tmp_path / "back", data_path=data, **SHARDED)
    there = losses(six_steps)
    assert losses(tmp_path / "other") == pytest.approx({step: there[step] for step in (3, 4)}, **ROUNDING)
    assert losses(tmp_path / "back") == pytest.approx({step: there[step] for step in (5, 6)}, **ROUNDING)
    assert [entry["consumed_samples"] for entry in entries(tmp_path / "back")] == [40, 48]


@pytest.mark.long
def test_tensor_and_pipeline_parallel_sizes_may_change(tmp_path: Path, data: str) -> None:
    """One step each on 1 rank, tp 2, pp 2, tp 2 with pp 2, and 1 rank: the losses are those of one rank, to rounding."""
    flags = dict(data_path=data, train_iters=6, dist_ckpt_optim_fully_reshardable=True, num_layers=4, **SHARDED)
    train(**flags, save=tmp_path / "one")
    path = tmp_path / "many"
    for world_size, layout in ((1, {}), (2, TP2), (2, VP2), (4, dict(TP2, **PP2)), (2, PP2), (1, {})):
        train(world_size, **(flags | layout), save=path, load=path, exit_interval=1)
    assert losses(path) == pytest.approx(losses(tmp_path / "one"), **ROUNDING)
    assert [state_of(path, step)["layout"]["pipeline"] for step in checkpoints(path)] == [1, 1, 2, 2, 2, 1]


@pytest.mark.long
def test_a_routine_checkpoint_under_another_tp_is_refused_with_the_way_out(tmp_path: Path, data: str, six_steps: Path) -> None:
    flags = dict(data_path=data, train_iters=6, save=tmp_path, load=six_steps / "iter_0000004", **SHARDED, **TP2)
    message = refused(2, **flags)
    for word in ("dp_reshardable", "--tensor-model-parallel-size 1", "--tensor-model-parallel-size 2",
                 "--dist-ckpt-optim-fully-reshardable", "--no-load-optim"):  # fmt: skip
        assert word in message
    assert list(tmp_path.iterdir()) == []
    train(2, **flags, no_load_optim=True)
    assert losses(tmp_path)[5] == pytest.approx(losses(six_steps)[5], **ROUNDING)


@pytest.mark.long
def test_a_run_can_be_extended(tmp_path: Path, data: str) -> None:
    """With a schedule of fixed length, 3 steps and 3 more equal 6. Without --lr-decay-iters the schedule stretches, which is logged."""
    flags = dict(data_path=data, lr_decay_iters=8)
    train(**flags, train_iters=6, save=tmp_path / "six")
    train(**flags, train_iters=3, save=tmp_path / "more")
    train(**flags, train_iters=6, save=tmp_path / "more", load=tmp_path / "more")
    assert numbers(tmp_path / "more") == numbers(tmp_path / "six")
    assert tensors(tmp_path / "more", 6) == tensors(tmp_path / "six", 6)
    flags = dict(data_path=data)
    train(**flags, train_iters=3, save=tmp_path / "stretched")
    ended = train(**flags, train_iters=6, save=tmp_path / "stretched", load=tmp_path / "stretched")
    assert "the run's length changed, and so does lr_decay_steps, from 24 to 48" in ended.err
    rates = [entry["lr"] for entry in entries(tmp_path / "stretched")]
    assert rates == pytest.approx([0.0, 3e-3, 3e-3 / 2, 3e-3 * 3 / 5, 3e-3 * 2 / 5, 3e-3 / 5])


def test_a_length_in_samples_is_the_same_length(tmp_path: Path, data: str, six_steps: Path) -> None:
    flags = dict(data_path=data, train_samples=6 * GLOBAL_BATCH, save=tmp_path, load=tmp_path, exit_interval=4, **SHARDED)
    train(**flags)
    train(**flags)
    assert numbers(tmp_path) == numbers(six_steps) and tensors(tmp_path, 6) == tensors(six_steps, 6)


def test_steps_of_another_size_end_at_the_same_sample(tmp_path: Path, data: str, six_steps: Path) -> None:
    """And each sample is trained on with the learning rate that it would have had."""
    flags = dict(data_path=data, train_iters=None, train_samples=48, load=six_steps / "iter_0000004", **SHARDED)
    train(**flags, save=tmp_path / "half", global_batch_size=4, lr_warmup_iters=2)
    found = [(entry["step"], entry["consumed_samples"], entry["lr"]) for entry in entries(tmp_path / "half")]
    assert [(step, consumed) for step, consumed, _ in found] == [(5, 36), (6, 40), (7, 44), (8, 48)]
    assert found[0][2] == entries(six_steps)[4]["lr"] and found[2][2] == entries(six_steps)[5]["lr"]
    message = refused(**flags, save=tmp_path / "no", global_batch_size=6, lr_warmup_iters=None, lr_warmup_samples=8)
    assert "--train-samples 48 less the 32 samples of the first 4 steps leaves 16" in message


@pytest.mark.long
def test_skipped_samples_stay_skipped_across_a_resume(tmp_path: Path, data: str, six_steps: Path) -> None:
    flags = dict(data_path=data, train_iters=6, skip_samples="20:28", **SHARDED)
    train(**flags, save=tmp_path / "one", save_interval=4)
    assert numbers(tmp_path / "one")[:2] == numbers(six_steps)[:2]
    assert losses(tmp_path / "one")[3] != losses(six_steps)[3]
    for step, original in ((2, six_steps), (4, tmp_path / "one")):  # asked for after a look at the curve; and kept
        resume(original, step, tmp_path / str(step), **flags)
        assert numbers(tmp_path / str(step)) == numbers(tmp_path / "one")[step:]


def test_other_data_is_refused_unless_it_is_meant(tmp_path: Path, data: str, six_steps: Path) -> None:
    """--new-data keeps step and optimizer and starts the data at its beginning, once; --finetune keeps the weights alone."""
    flags = dict(data_path=write_tokens(tmp_path / "other", seed=1), **SHARDED)
    message = refused(train_iters=6, **flags, load=six_steps, save=tmp_path / "refused")
    there = state_of(six_steps, 6)["data_fingerprint"]
    assert "--data-path" in message and "--new-data" in message and there in message
    assert not (tmp_path / "refused").exists()

    resume(six_steps, 2, tmp_path / "new", new_data=True, exit_interval=4, **flags)
    state = state_of(tmp_path / "new", 4)
    assert state["data"] == {"position": 2 * GLOBAL_BATCH} and state["consumed_samples"] == 4 * GLOBAL_BATCH
    (event,) = state["events"]
    assert (event["event"], event["step"], event["from"], event["to"]) == ("new_data", 2, there, state["data_fingerprint"])
    train(train_iters=6, **flags, load=tmp_path / "new", save=tmp_path / "new", new_data=True)  # the flag may stay
    resume(six_steps, 2, tmp_path / "at once", new_data=True, **flags)
    assert numbers(tmp_path / "new") == numbers(tmp_path / "at once")
    assert len(state_of(tmp_path / "new", 6)["events"]) == 1

    ended = train(train_iters=6, **flags, load=six_steps / "iter_0000002", save=tmp_path / "tuned", finetune=True)
    tuned, kept = numbers(tmp_path / "tuned"), numbers(tmp_path / "at once")
    assert tuned[0][:2] == (1, GLOBAL_BATCH) and tuned[0][2:4] == kept[0][2:4]  # same weights, same batch
    assert tuned[0][4] == 0.0 and tuned[1][2] != kept[1][2]  # fresh schedule and optimizer
    assert state_of(tmp_path / "tuned", 6)["events"][0]["event"] == "finetune", ended


@pytest.mark.long
def test_optimizer_and_random_state_can_be_left_behind(tmp_path: Path, data: str) -> None:
    """The first loss after resuming shows which weights and dropout masks were used, the second which moments."""
    flags = dict(data_path=data, train_iters=6, **SHARDED, **DROPOUT)
    train(**flags, save=tmp_path / "one", save_interval=2)
    original = losses(tmp_path / "one")
    curves = {}
    for name in ("no_load_optim", "no_load_rng"):
        resume(tmp_path / "one", 4, tmp_path / name, **flags, **{name: True})
        curves[name] = losses(tmp_path / name)
    assert curves["no_load_optim"][5] == original[5] and curves["no_load_optim"][6] != original[6]
    assert curves["no_load_rng"][5] != original[5]


@pytest.mark.long
def test_another_schedule_is_refused_unless_a_side_is_chosen(tmp_path: Path, data: str, six_steps: Path) -> None:
    flags = dict(data_path=data, train_iters=6, lr=1e-3, load=six_steps / "iter_0000004", **SHARDED)
    message = refused(**flags, save=tmp_path / "refused")
    assert "max_lr is 0.003 there and 0.001 here" in message and "--override-opt-param-scheduler" in message
    train(**flags, save=tmp_path / "override", override_opt_param_scheduler=True)
    train(**flags, save=tmp_path / "checkpoint", use_checkpoint_opt_param_scheduler=True)
    rates = {name: [entry["lr"] for entry in entries(tmp_path / name)] for name in ("override", "checkpoint")}
    assert rates["checkpoint"] == [entry["lr"] for entry in entries(six_steps)][4:]
    assert rates["override"] == pytest.approx([rate / 3 for rate in rates["checkpoint"]])
    assert numbers(tmp_path / "checkpoint") == numbers(six_steps)[4:]


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(hidden_size=64), ("--hidden-size is 32 there and 64 here",)),
        (dict(num_layers=3, norm_epsilon=1e-6), ("--num-layers is 2 there and 3 here", "--norm-epsilon is 1e-05 there and")),
        (dict(seq_length=8), ("--seq-length is 16 there and 8 here",)),
        (dict(seed=5), ("--data-path", "--seed 1234", "--seed 5")),
        (dict(valid_share=0.2), ("--data-path", "--new-data")),
        (dict(use_distributed_optimizer=False), ("--use-distributed-optimizer", "--no-load-optim")),
    ],
)  # fmt: skip
def test_another_run_is_refused_naming_both_sides(
    tmp_path: Path, data: str, six_steps: Path, flags: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refused(**(dict(SHARDED, data_path=data, train_iters=8) | flags), load=six_steps, save=tmp_path)
    assert all(word in message for word in words), message
    assert "\n" not in message and list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_named_and_stepped_over_on_request(tmp_path: Path, data: str, six_steps: Path) -> None:
    flags = dict(data_path=data, train_iters=6, save=tmp_path, save_interval=2, **SHARDED)
    train(**flags, exit_interval=4)
    (shard,) = (tmp_path / "iter_0000004").glob("*.distcp")
    flip(shard, 1000)
    (ended,) = run(**flags, load=tmp_path)
    assert ended.status == 2 and shard.name in the_error(ended.err) and "--load-fallback" in ended.err
    assert losses(tmp_path).keys() == {1, 2, 3, 4}  # untouched
    ended = train(**flags, load=tmp_path, load_fallback=True)
    assert shard.name in ended.err
    assert numbers(tmp_path) == numbers(six_steps) and tensors(tmp_path, 6) == tensors(six_steps, 6)


def test_a_load_without_a_checkpoint_starts_afresh_only_where_it_is_the_save(tmp_path: Path, data: str) -> None:
    flags = dict(data_path=data, train_iters=2, load=tmp_path / "there")
    assert f"--load {tmp_path / 'there'} holds no checkpoint" in refused(**flags, save=tmp_path / "here")
    train(**flags, save=tmp_path / "there")
    assert checkpoints(tmp_path / "there") == [2]


def test_the_evaluation_after_a_linked_checkpoint_is_not_noted_in_what_the_link_points_to(tmp_path: Path, data: str) -> None:
    evaluated = dict(data_path=data, valid_share=0.2, eval_iters=1, eval_interval=2)
    train(**evaluated, train_iters=2, save=tmp_path / "theirs")
    theirs, mine = tmp_path / "theirs" / "iter_0000002", tmp_path / "mine"
    (theirs / "evaluated.json").unlink()  # as after a kill before the evaluation
    mine.mkdir()
    (mine / theirs.name).symlink_to(theirs)
    train(**evaluated, train_iters=3, save=mine, load=mine)
    assert [entry["step"] for entry in entries(mine, "eval")] == [2, 3] and not (theirs / "evaluated.json").exists()


@contextlib.contextmanager
def reading_fails_in_step_4() -> Iterator[None]:
    def fetch(batches: Batches, consumed: int) -> list[Microbatch]:
        if consumed == 3 * GLOBAL_BATCH:
            time.sleep(1.0)  # so that the results of the save after step 2 are there
            raise OSError("no data")
        return original(batches, consumed)

    original = Batches.fetch
    with mock.patch.object(Batches, "fetch", fetch):
        yield


def test_a_save_that_a_failed_run_left_does_not_spoil_those_of_the_next_run_in_the_process(tmp_path: Path) -> None:
    flags = dict(data_path=write_tokens(tmp_path / "words"), async_save=True)
    with pytest.raises(RankError, match="no data"):
        run(**flags, train_iters=5, save=tmp_path / "failed", save_interval=2, within=reading_fails_in_step_4)
    flags |= dict(num_layers=3, save=tmp_path / "next", load=tmp_path / "next")
    train(**flags, train_iters=2)
    train(**flags, train_iters=3)
    assert checkpoints(tmp_path / "next") == [2, 3]

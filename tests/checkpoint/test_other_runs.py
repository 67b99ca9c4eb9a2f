"""Checkpoints of other runs: what is refused, with both sides named, and what may be taken over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ParallelConfig
from megatron_salt.errors import UserError
from tests.checkpoint.test_checkpointer import PLAIN, pp, same, tp
from tests.support.checkpoint_runs import DROPOUT, SHARDED, Run, at, job
from tests.support.ranks import RankError, run_ranks


def refusal(world_size: int, run: Run, until: int = 2) -> str:
    """The message with which every rank refuses to start."""
    with pytest.raises(RankError) as caught:
        run_ranks(world_size, job, run, world_size, until)
    assert isinstance(caught.value.__cause__, UserError), caught.value
    assert str(caught.value).count("Traceback") == world_size
    return str(caught.value.__cause__)


@pytest.fixture(scope="module")
def routine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a routine save of step 2 by two data-parallel ranks."""
    directory = tmp_path_factory.mktemp("routine")
    run_ranks(2, job, Run(save=str(directory)), 2, 2, (2,))
    return directory


@pytest.mark.parametrize("parallel", [pp(2), tp(2)])
def test_a_routine_save_under_another_tp_or_pp_is_refused_with_the_way_out(routine: Path, parallel: ParallelConfig) -> None:
    message = refusal(2, Run(load=str(routine), parallel=parallel))
    assert "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1" in message
    assert f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size}" in message
    assert f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}" in message
    assert "--dist-ckpt-optim-fully-reshardable" in message and "--no-load-optim" in message
    left = run_ranks(2, job, Run(load=str(routine), parallel=parallel, flags={"no_load_optim": True}), 2, 3)
    assert left[0].progress.step == 2 and len(left[0].losses) == 1


def test_a_routine_save_under_another_cut_into_buckets_is_refused(routine: Path) -> None:
    parallel = replace(SHARDED, overlap_grad_reduce=True, ddp_bucket_size=9000)
    assert "--ddp-bucket-size" in refusal(2, Run(load=str(routine), parallel=parallel))


def test_optimizer_state_is_not_taken_across_use_distributed_optimizer(routine: Path) -> None:
    assert "--use-distributed-optimizer" in refusal(2, Run(load=str(routine), parallel=PLAIN))


@pytest.mark.parametrize(
    "change, sides",
    [
        ({"data": "content:bbbb"}, ["content:aaaa", "content:bbbb", "--new-data"]),
        ({"tokenizer": "tokenizer:bbbb"}, ["tokenizer:aaaa", "tokenizer:bbbb", "--finetune"]),
        ({"tokenizer": "tokenizer:bbbb", "flags": {"new_data": True}}, ["tokenizer:aaaa", "tokenizer:bbbb"]),
        ({"model": DROPOUT}, ["--hidden-dropout is 0.0 there and 0.1 here", "--attention-dropout"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_both_sides_named(routine: Path, change: dict, sides: list[str]) -> None:
    message = refusal(2, replace(Run(load=str(routine)), **change))
    assert all(side in message for side in sides), message


def test_finetune_takes_the_weights_alone(routine: Path) -> None:
    weights = run_ranks(1, job, Run(load=str(routine)), 1, 0)[0].weights
    other = Run(load=str(routine), data="content:bbbb", tokenizer="tokenizer:bbbb", model=DROPOUT, flags={"finetune": True})
    (left,) = run_ranks(1, job, other, 1, 0)
    assert left.weights == weights and left.progress.step == left.progress.consumed_samples == 0
    assert (
        left.optimizer == run_ranks(1, job, replace(Run(load=str(routine), flags={"no_load_optim": True})), 1, 0)[0].optimizer
    )
    wider = replace(other, model=replace(DROPOUT, ffn_hidden_size=96))
    assert "mlp.linear_fc2.weight is [2, 32, 64] there and [2, 32, 96] here" in refusal(1, wider).replace("decoder.layers.", "")


@pytest.mark.long
def test_new_data_keeps_optimizer_and_step_and_is_recorded_once(tmp_path: Path, routine: Path) -> None:
    run = Run(load=str(routine), save=str(tmp_path), data="content:bbbb", flags={"new_data": True})
    left = run_ranks(2, job, run, 2, 2)
    assert same(left, run_ranks(2, job, Run(load=str(routine)), 2, 2))
    progress = left[0].progress
    assert progress.step == 2 and progress.position == 0
    assert progress.events[-1] == {"event": "new_data", "step": 2, "from": "content:aaaa", "to": "content:bbbb"}
    run_ranks(2, job, run, 2, 3, (3,))
    again = run_ranks(2, job, replace(run, load=str(tmp_path)), 2, 3)[0].progress
    assert again.position == at(3).position and again.events == at(3).events, "the flag may stay: the data is no longer new"


def test_random_state_of_another_layout_is_not_reused(routine: Path, tmp_path: Path) -> None:
    two = run_ranks(2, job, Run(load=str(routine)), 2, 2)
    assert two[0].rng != run_ranks(2, job, Run(load=str(routine), seed=5, flags={"no_load_rng": True}), 2, 2)[0].rng
    (one,) = run_ranks(1, job, Run(load=str(routine)), 1, 2)
    (fresh,) = run_ranks(1, job, Run(), 1, 0)
    assert one.rng not in (two[0].rng, fresh.rng), "seeded anew, for this step"


def test_load_without_a_checkpoint_starts_afresh_only_where_it_equals_save(tmp_path: Path) -> None:
    (left,) = run_ranks(1, job, Run(load=str(tmp_path / "a"), save=str(tmp_path / "b" / ".." / "a")), 1, 0)
    assert left.progress is None
    assert "holds no checkpoint" in refusal(1, Run(load=str(tmp_path / "c"), save=str(tmp_path / "a")))

"""Saving and resuming on 1, 2 and 4 ranks, through the same calls that a training run makes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_salt.checkpoint import async_writer, integrity, save_directory
from megatron_salt.config import ParallelConfig
from tests.support.checkpoint_runs import DROPOUT, SHARDED, TINY, Left, Run, job, rewrite
from tests.support.ranks import RankError, run_ranks
from tests.support.small import GLOBAL_BATCH

PLAIN = ParallelConfig()
OVERLAP = ParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


def tp(size: int, **others: object) -> ParallelConfig:
    return replace(SHARDED, tensor_model_parallel_size=size, sequence_parallel=size > 1, **others)


def pp(size: int, **others: object) -> ParallelConfig:
    return replace(SHARDED, pipeline_model_parallel_size=size, **others)


def same(one: list[Left], other: list[Left]) -> bool:
    """Whether two jobs left the same bits on every rank."""
    return [(x.weights, x.optimizer, x.rng, x.learning_rate) for x in one] == [
        (x.weights, x.optimizer, x.rng, x.learning_rate) for x in other
    ]


def state_of(root: Path, step: int) -> dict:
    """state.json of a checkpoint."""
    return json.loads((save_directory.directory_of(root, step) / save_directory.STATE).read_bytes())


@pytest.mark.long
@pytest.mark.parametrize(
    "world_size, parallel, dtype, flags",
    [
        pytest.param(1, PLAIN, torch.float32, {}, marks=pytest.mark.full),
        pytest.param(1, SHARDED, torch.float32, {"async_save": True}, marks=pytest.mark.full),
        pytest.param(2, SHARDED, torch.float32, {"async_save": True}, marks=pytest.mark.full),
        pytest.param(2, OVERLAP, torch.bfloat16, {}, marks=pytest.mark.full),
        pytest.param(2, pp(2, num_virtual_stages_per_pipeline_rank=2), torch.float32, {}, marks=pytest.mark.full),
        (1, PLAIN, torch.bfloat16, {"async_save": True}),
        (2, replace(PLAIN, pipeline_model_parallel_size=2), torch.float32, {}),
        (2, SHARDED, torch.bfloat16, {}),
        (2, SHARDED, torch.float32, {"async_save": True, "dist_ckpt_optim_fully_reshardable": True}),
        (2, tp(2), torch.bfloat16, {"async_save": True}),
        (2, replace(SHARDED, context_parallel_size=2), torch.float32, {}),
        (2, pp(2, num_virtual_stages_per_pipeline_rank=2), torch.float32, {"dist_ckpt_optim_fully_reshardable": True}),
        (2, OVERLAP, torch.float32, {"async_save": True}),
    ],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, world_size: int, parallel: ParallelConfig, dtype: torch.dtype, flags: dict
) -> None:
    """With dropout, so that the random state matters. Training goes on while an async save is written."""
    model = replace(DROPOUT, num_layers=4) if parallel.pipeline_model_parallel_size > 1 else DROPOUT
    run = Run(save=str(tmp_path), parallel=parallel, dtype=dtype, model=model, flags=flags)
    uninterrupted = run_ranks(world_size, job, run, world_size, 4, (2,))
    resumed = run_ranks(world_size, job, replace(run, save=None, load=str(tmp_path), flags={}, seed=99), world_size, 4)
    assert resumed[0].progress is not None and resumed[0].progress.step == 2
    assert resumed[0].losses == uninterrupted[0].losses[2:]
    assert same(resumed, uninterrupted)


def test_what_is_saved_beside_the_tensors_comes_back(tmp_path: Path) -> None:
    run_ranks(1, job, Run(save=str(tmp_path)), 1, 2, (2,))
    (left,) = run_ranks(1, job, Run(load=str(tmp_path)), 1, 2)
    progress = left.progress
    assert progress.step == 2 and progress.consumed_samples == 2 * GLOBAL_BATCH
    assert progress.position == 2 * GLOBAL_BATCH and progress.nonfinite_in_a_row == 1
    assert progress.events == ({"event": "start", "step": 0},)
    directory = save_directory.directory_of(tmp_path, 2)
    assert (directory / "run.yaml").read_text() == "seed: 1234\n"
    assert {path.name for path in (directory / "tokenizer").iterdir()}
    listed = integrity.read_checksums(directory).keys()
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert there == listed | {integrity.CHECKSUMS}


@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param((1, SHARDED), (2, tp(2)), marks=pytest.mark.full),
        pytest.param((2, tp(2)), (1, SHARDED), marks=pytest.mark.full),
        pytest.param((2, SHARDED), (2, replace(SHARDED, context_parallel_size=2)), marks=pytest.mark.full),
        pytest.param((1, SHARDED), (2, pp(2)), marks=pytest.mark.full),
        ((1, PLAIN), (2, replace(PLAIN, tensor_model_parallel_size=2))),
        ((1, SHARDED), (4, tp(2, pipeline_model_parallel_size=2))),
        ((4, tp(2, pipeline_model_parallel_size=2)), (1, SHARDED)),
        ((2, pp(2, num_virtual_stages_per_pipeline_rank=2)), (2, tp(2))),
    ],
)
def test_a_final_save_loads_under_any_layout(tmp_path: Path, before: tuple, after: tuple) -> None:
    """Oracle: losses of two more steps of the uninterrupted run. The second depends on the optimizer's moments."""
    model = replace(TINY, num_layers=4)
    run = Run(save=str(tmp_path), parallel=before[1], model=model)
    uninterrupted = run_ranks(before[0], job, run, before[0], 4, (2,), True)[0].losses[2:]
    resumed = run_ranks(after[0], job, Run(load=str(tmp_path), parallel=after[1], model=model), after[0], 4)[0].losses
    assert resumed == pytest.approx(uninterrupted, abs=2e-6)


@pytest.mark.long
def test_a_routine_save_loads_under_another_data_parallel_size(tmp_path: Path) -> None:
    """In form dp_reshardable: from 1 to 2 to 1 ranks without a step in between, and every bit is the same."""
    one = run_ranks(1, job, Run(save=str(tmp_path / "a")), 1, 2, (2,))
    two = run_ranks(2, job, Run(save=str(tmp_path / "b"), load=str(tmp_path / "a")), 2, 3, (3,))
    assert (
        state_of(tmp_path / "a", 2)["optimizer"]["form"] == state_of(tmp_path / "b", 3)["optimizer"]["form"] == "dp_reshardable"
    )
    back = run_ranks(1, job, Run(load=str(tmp_path / "b")), 1, 3)
    assert back[0].weights == two[0].weights
    there_and_back = run_ranks(2, job, Run(save=str(tmp_path / "c"), load=str(tmp_path / "a")), 2, 2)
    assert there_and_back[0].weights == one[0].weights
    uninterrupted = run_ranks(1, job, Run(), 1, 4)[0].losses
    assert run_ranks(1, job, Run(load=str(tmp_path / "b")), 1, 4)[0].losses == pytest.approx(uninterrupted[3:], abs=2e-6)


@pytest.mark.long
def test_weights_saved_before_the_first_step_resume(tmp_path: Path) -> None:
    for final in (False, True):
        uninterrupted = run_ranks(2, job, Run(), 2, 2)
        run_ranks(2, save_at_once, Run(save=str(tmp_path / str(final))), final)
        assert same(run_ranks(2, job, Run(load=str(tmp_path / str(final)), seed=5), 2, 2), uninterrupted)


def save_at_once(run: Run, final: bool) -> None:
    from tests.support.checkpoint_runs import at, start

    _, checkpointer, _ = start(run, 2)
    checkpointer.save(at(0), final=final)


@pytest.mark.parametrize("parallel", [PLAIN, SHARDED])
def test_an_async_save_holds_its_own_step_however_late_it_is_written(tmp_path: Path, parallel: ParallelConfig) -> None:
    """The writing process starts to write after two more steps have changed every weight in place."""
    late = run_ranks(1, job_with_a_late_writer, Run(save=str(tmp_path / "late"), parallel=parallel, flags={"async_save": True}))
    run_ranks(1, job, Run(save=str(tmp_path / "now"), parallel=parallel), 1, 2, (2,))
    resumed = [run_ranks(1, job, Run(load=str(tmp_path / name), parallel=parallel), 1, 4) for name in ("late", "now")]
    assert same(*resumed) and same(resumed[0], late)


def job_with_a_late_writer(run: Run) -> Left:
    def late(*arguments: object) -> None:
        time.sleep(1.0)
        write_and_sum(*arguments)

    write_and_sum = async_writer._write_and_sum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_writer, "_write_and_sum", late)
        return job(run, 1, 4, (2,))


@pytest.mark.long
def test_buckets_that_some_rank_has_no_part_of_are_saved_in_the_other_form(tmp_path: Path) -> None:
    """On the last stage a norm of 32 weights is a bucket of its own here, and one data-parallel rank holds all of it."""
    parallel = replace(OVERLAP, pipeline_model_parallel_size=2, ddp_bucket_size=1000)
    run = Run(save=str(tmp_path / "4"), parallel=parallel, model=replace(DROPOUT, num_layers=2))
    uninterrupted = run_ranks(4, job, run, 4, 3, (2,))
    assert state_of(tmp_path / "4", 2)["optimizer"]["form"] == "fully_reshardable"
    assert same(run_ranks(4, job, replace(run, save=None, load=run.save), 4, 3), uninterrupted)
    run_ranks(2, job, replace(run, save=str(tmp_path / "2")), 2, 1, (1,))
    assert state_of(tmp_path / "2", 1)["optimizer"]["form"] == "dp_reshardable"
    with pytest.raises(
        RankError, match="cannot be cut for 2 data- and context-parallel ranks.*--dist-ckpt-optim-fully-reshardable"
    ):
        run_ranks(4, job, replace(run, save=None, load=str(tmp_path / "2")), 4, 1)


def test_checkpoints_of_a_release_without_lineages_are_the_resumed_runs_own(tmp_path: Path) -> None:
    """They load, and make room for what the run saves on top of them; another run's in the same place does not."""
    run_ranks(1, job, Run(save=str(tmp_path)), 1, 4, (1, 2, 3, 4))
    for step in (1, 2, 4):
        rewrite(save_directory.directory_of(tmp_path, step), lineage=...)
    run_ranks(1, job, Run(save=str(tmp_path), load=str(tmp_path), flags={"keep_last": 1}), 1, 6, (5, 6))
    assert list(save_directory.whole_checkpoints(tmp_path)) == [3, 6]
    assert state_of(tmp_path, 6)["lineage"][0] == ["", 0]

"""The arithmetic of a run: counts agree with each other, and a batch that cannot be cut is refused by flag and number."""

from __future__ import annotations

import pytest

from megatron_salt.config import ParallelConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.plan import RunPlan, plan_run

INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=2)


def plan(layout: Layout = Layout(), parallel: ParallelConfig = ParallelConfig(), **training: int) -> RunPlan:
    return plan_run(TrainingConfig(**training), parallel, layout)


@pytest.mark.parametrize("micro, data, microbatches, steps", [(1, 1, 1, 1), (2, 3, 4, 5), (4, 2, 8, 10)])
def test_a_step_has_the_samples_asked_for_however_it_is_cut(micro, data, microbatches, steps):
    size = micro * data * microbatches
    expected = RunPlan(steps, size, micro, microbatches)
    assert plan(Layout(data=data), micro_batch_size=micro, global_batch_size=size, train_iters=steps) == expected
    assert plan(Layout(data=data), micro_batch_size=micro, global_batch_size=size, train_samples=steps * size) == expected
    assert expected.total_samples == steps * size


def test_without_a_global_batch_each_replica_has_one_microbatch():
    assert plan(Layout(data=3, tensor=2), micro_batch_size=4, train_iters=1) == RunPlan(1, 12, 4, 1)


@pytest.mark.parametrize("given, layout, parallel, message", [
    (dict(global_batch_size=10, micro_batch_size=2, train_iters=1), Layout(data=2), ParallelConfig(),
     "--global-batch-size 10 is not divisible by --micro-batch-size 2 x 2 data-parallel replicas"),
    (dict(global_batch_size=12, micro_batch_size=2, train_iters=1), Layout(pipeline=4), INTERLEAVED,
     ("--num-virtual-stages-per-pipeline-rank 2 needs the 6 microbatches of a replica "
      "(--global-batch-size 12 / --micro-batch-size 2 / 1 replicas) to be a multiple of --pipeline-model-parallel-size 4")),
    (dict(global_batch_size=4, micro_batch_size=2, train_iters=1), Layout(pipeline=4), INTERLEAVED, "needs the 2 microbatches"),
    (dict(global_batch_size=4, train_samples=10), Layout(), ParallelConfig(),
     "--train-samples 10 is not a multiple of --global-batch-size 4"),
    (dict(global_batch_size=4), Layout(), ParallelConfig(), "--train-iters or --train-samples"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_flag_and_number(given, layout, parallel, message):
    with pytest.raises(UserError) as refused:
        plan(layout, parallel, **given)
    assert message in str(refused.value)


def test_few_microbatches_are_enough_without_interleaving():
    plain = ParallelConfig(pipeline_model_parallel_size=4)
    assert plan(Layout(pipeline=4), plain, global_batch_size=1, train_iters=1).num_microbatches == 1
    assert plan(Layout(pipeline=4), INTERLEAVED, global_batch_size=8, train_iters=1).num_microbatches == 8

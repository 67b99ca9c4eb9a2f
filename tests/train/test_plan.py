"""Counts of a run agree with each other, and a batch that cannot be cut is refused by flag and number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_salt.config import CheckpointConfig, ParallelConfig, RunConfig, SaltConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.plan import RunPlan, check_teacher, plan_run, refuse_steps_beyond

INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=2)


PLAIN = SaltConfig()


def plan(
    layout: Layout = Layout(), parallel: ParallelConfig = ParallelConfig(), salt: SaltConfig = PLAIN, **training: int
) -> RunPlan:
    return plan_run(TrainingConfig(**training), parallel, layout, salt)


def teaching(**flags: Any) -> SaltConfig:
    return SaltConfig(**(dict(teacher_load="teacher", kd_steps=100) | flags))


@pytest.mark.parametrize("micro, data, microbatches, steps", [(1, 1, 1, 1), (2, 3, 4, 5), (4, 2, 8, 10)])
def test_a_step_has_the_samples_asked_for_however_it_is_cut(micro, data, microbatches, steps):
    size = micro * data * microbatches
    expected = RunPlan(
        total_steps=steps,
        global_batch_size=size,
        micro_batch_size=micro,
        num_microbatches=microbatches,
        stage2_micro_batch_size=micro,
    )
    assert plan(Layout(data=data), micro_batch_size=micro, global_batch_size=size, train_iters=steps) == expected
    assert plan(Layout(data=data), micro_batch_size=micro, global_batch_size=size, train_samples=steps * size) == expected
    assert expected.total_samples == steps * size


def test_without_a_global_batch_each_replica_has_one_microbatch():
    assert plan(Layout(data=3, tensor=2), micro_batch_size=4, train_iters=1) == RunPlan(
        total_steps=1, global_batch_size=12, micro_batch_size=4, num_microbatches=1, stage2_micro_batch_size=4
    )


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


@pytest.mark.parametrize("stage2, microbatches", [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_stage_2_has_the_same_samples_in_each_step_however_it_is_cut(stage2, microbatches):
    stage1 = plan(
        Layout(data=2), micro_batch_size=2, global_batch_size=24, train_iters=5, salt=teaching(stage2_micro_batch_size=stage2)
    )
    assert (stage1.micro_batch_size, stage1.num_microbatches) == (2, 6)
    assert stage1.in_stage2() == replace(stage1, micro_batch_size=stage2, num_microbatches=microbatches)
    assert stage1.in_stage2().in_stage2() == stage1.in_stage2()


def test_without_another_micro_batch_size_nothing_changes_in_stage_2():
    stage1 = plan(Layout(data=2), micro_batch_size=2, global_batch_size=24, train_iters=5, salt=teaching())
    assert stage1.in_stage2() == stage1


@pytest.mark.parametrize("teacher, merge, forwards", [(None, 1, 6), (2, 1, 6), (4, 2, 3), (6, 3, 2), (12, 6, 1)])
def test_a_teacher_forward_merges_microbatches(teacher, merge, forwards):
    found = plan(
        Layout(data=2), micro_batch_size=2, global_batch_size=24, train_iters=5, salt=teaching(teacher_micro_batch_size=teacher)
    )
    assert (found.teacher_merge, found.num_teacher_forwards) == (merge, forwards)


@pytest.mark.parametrize("salt, training, layout, parallel, message", [
    (dict(stage2_micro_batch_size=5), dict(global_batch_size=24), Layout(data=2), ParallelConfig(),
     "--global-batch-size 24 is not divisible by --stage2-micro-batch-size 5 x 2 data-parallel replicas"),
    (dict(stage2_micro_batch_size=4), dict(), Layout(data=2), ParallelConfig(),
     "--global-batch-size 4 is not divisible by --stage2-micro-batch-size 4 x 2"),
    (dict(stage2_micro_batch_size=4), dict(global_batch_size=8), Layout(pipeline=4), INTERLEAVED,
     ("--num-virtual-stages-per-pipeline-rank 2 needs the 2 microbatches of a replica (--global-batch-size 8 / "
      "--stage2-micro-batch-size 4 / 1 replicas) to be a multiple of --pipeline-model-parallel-size 4")),
    (dict(teacher_micro_batch_size=3), dict(global_batch_size=24), Layout(data=2), ParallelConfig(),
     "--teacher-micro-batch-size 3 is not a multiple of --micro-batch-size 2"),
    (dict(teacher_micro_batch_size=1), dict(global_batch_size=24), Layout(data=2), ParallelConfig(),
     "--teacher-micro-batch-size 1 is not a multiple of --micro-batch-size 2"),
    (dict(teacher_micro_batch_size=8), dict(global_batch_size=24), Layout(data=2), ParallelConfig(),
     "--teacher-micro-batch-size 8 does not divide the 12 samples of a replica (--global-batch-size 24 / 2 data-parallel replicas)"),
])  # fmt: skip
def test_what_cannot_be_cut_for_stage_2_or_the_teacher_is_refused_at_start(salt, training, layout, parallel, message):
    micro = 1 if parallel is INTERLEAVED else 2
    with pytest.raises(UserError) as refused:
        plan(layout, parallel, teaching(**salt), micro_batch_size=micro, train_iters=5, **training)
    assert message in str(refused.value)


CROSSOVER = dict(kd_stop="crossover", kd_steps=100)


@pytest.mark.parametrize("salt, training, layout, message", [
    (dict(teacher_tensor_model_parallel_size=3), dict(), Layout(tensor=2, data=3, pipeline=2),
     "--teacher-tensor-model-parallel-size 3 x --teacher-pipeline-model-parallel-size 1 = 3 does not divide the 4 ranks"),
    (dict(teacher_pipeline_model_parallel_size=2), dict(), Layout(data=2), "= 2 does not divide the 1 ranks of a student replica"),
    (dict(), dict(seq_length=36), Layout(tensor=4, context=2), "--seq-length 36 is not divisible by"),
    (CROSSOVER, dict(eval_iters=0), Layout(), "--kd-stop crossover compares held-out accuracies: it needs --eval-iters above 0, got 0"),
    (CROSSOVER, dict(eval_iters=1, eval_interval=100), Layout(), "--eval-interval 100"),
    (CROSSOVER | dict(kd_transition="linear", kd_transition_steps=20), dict(eval_iters=1, eval_interval=80), Layout(),
     "--kd-transition-steps 20 stage 1 is over by --kd-steps 100 anyway"),
])  # fmt: skip
def test_a_teacher_that_cannot_be_is_refused_by_flag_and_number(salt, training, layout, message):
    with pytest.raises(UserError) as refused:
        check_teacher(teaching(**salt), TrainingConfig(**training), layout)
    assert message in str(refused.value)


def test_teachers_that_can_be():
    sizes = dict(teacher_tensor_model_parallel_size=2, teacher_pipeline_model_parallel_size=2)
    check_teacher(teaching(**sizes), TrainingConfig(), Layout(tensor=4, data=2, pipeline=2))
    check_teacher(teaching(**CROSSOVER), TrainingConfig(eval_iters=1, eval_interval=99), Layout())
    check_teacher(PLAIN, TrainingConfig(seq_length=36), Layout(tensor=4, context=2))


def test_checkpoints_to_keep_lie_inside_the_run():
    refuse_steps_beyond(RunConfig(checkpoint=CheckpointConfig(save="run", save_at=(1, 5, 10))), 10)
    with pytest.raises(UserError, match="^--save-at 11 20 lies beyond the run's last step, 10$"):
        refuse_steps_beyond(RunConfig(checkpoint=CheckpointConfig(save="run", save_at=(5, 11, 20))), 10)


def test_a_profile_begins_inside_the_run():
    flags = dict(profile_step_start=10, profile_step_end=12)
    refuse_steps_beyond(RunConfig(training=TrainingConfig(profile=True, **flags)), 10)
    refuse_steps_beyond(RunConfig(training=TrainingConfig(profile=False, **flags)), 9)
    with pytest.raises(
        UserError, match="^--profile-step-start 10 lies beyond the run's last step, 9: nothing would be profiled$"
    ):
        refuse_steps_beyond(RunConfig(training=TrainingConfig(profile=True, **flags)), 9)

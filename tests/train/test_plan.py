"""What flags alone decide and get wrong: counts agree, and a mistake is refused by flag and number, at a start and a --dry-run alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_salt import pretrain
from megatron_salt.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SaltConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout
from megatron_salt.train import dry_run
from megatron_salt.train import run as run_module
from megatron_salt.train.plan import RunPlan, check_guidance, check_teacher, plan_run, refuse_steps_beyond
from tests.support.program import argv, the_error

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


def test_guidance_of_a_layer_or_step_that_is_not_there_is_refused():
    run = plan(Layout(), ParallelConfig(), PLAIN, micro_batch_size=1, train_iters=5)

    def check_of(layer: int, steps: int) -> None:
        salt = SaltConfig(teacher_load="t", guide="hidden", let_steps=steps, let_layer=layer)
        check_guidance(RunConfig(salt=salt, model=ModelConfig(num_layers=2)), run)

    check_of(2, 5)
    with pytest.raises(UserError, match="^--let-layer 3 is not one of the student's layers, 1 to --num-layers 2$"):
        check_of(3, 5)
    with pytest.raises(UserError, match="^--let-steps 6 lies beyond the run's last step, 5$"):
        check_of(2, 6)


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


# --- a start and a --dry-run ------------------------------------------------------------


WSD = dict(lr_decay_style="WSD")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(lr_warmup_iters=1000), "comes to 8000 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=0, lr_warmup_samples=48), "comes to 48 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=0, lr_warmup_fraction=1.0), "comes to 48 samples, and the decay ends at 48"),
    (dict(lr_warmup_iters=3, lr_decay_iters=3), "comes to 24 samples, and the decay ends at 24"),
    (dict(WSD, lr_wsd_decay_iters=1000), "--lr-wsd-decay-iters comes to 8000 samples, and the whole decay has 48"),
    (dict(WSD, lr_wsd_decay_samples=49), "--lr-wsd-decay-iters comes to 49 samples, and the whole decay has 48"),
    (dict(WSD), "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (dict(start_weight_decay=0.1), "--start-weight-decay 0.1"),
    (dict(skip_samples="a:b"), "--skip-samples takes A:B with whole numbers 0 <= A < B, such as 51200:56320, got a:b"),
    (dict(skip_samples="30:20"), "--skip-samples takes A:B"),
    (dict(skip_samples="0:" + "9" * 5000), "--skip-samples takes A:B"),
    (dict(skip_samples="0:" + "9" * 19), "--skip-samples 0:9999999999999999999 jumps over more samples than can be counted"),
    (dict(skip_samples=["5:12", "5:9"]), "--skip-samples 5:9 and 5:12 start at the same sample"),
    (dict(seed="9" * 20), "--seed must be at most 4611686018427387904 in size, got 99999999999999999999"),
    (dict(adam_beta1=1), "--adam-beta1 must be at least 0 and below 1, got 1"),
    (dict(init_method_std=1e300), "--init-method-std must lie in [0.0, 1.0], got 1e+300"),
    (dict(hidden_dropout=1), "--hidden-dropout must be at least 0 and below 1, got 1"),
    (dict(train_iters=2**60), "are more samples than can be counted"),
    (dict(train_iters=None), "give the run a length: --train-iters or --train-samples"),
    (dict(train_iters=None, train_samples=9), "--train-samples 9 is not a multiple of --global-batch-size 8"),
    (dict(global_batch_size=9), "--global-batch-size 9 is not divisible by --micro-batch-size 2 x 1"),
    (dict(save="SAVE", save_at=7), "--save-at 7 lies beyond the run's last step, 6"),
    (dict(tensor_model_parallel_size=2), "--tensor-model-parallel-size 2"),
    (dict(save=None, keep_last=2), "--keep-last 2 needs --save"),
    (dict(save=None, async_save=True), "--async-save needs --save"),
    (dict(save=None, on_save_error="continue"), "--on-save-error continue needs --save"),
    (dict(save=None, dist_ckpt_optim_fully_reshardable=True), "--dist-ckpt-optim-fully-reshardable needs --save"),
    (dict(save=None, profile=True), "--profile has nowhere to write its trace; give --tensorboard-dir or --save"),
    (dict(profile=True, profile_ranks=[0, 5]), "--profile-ranks 5: the run has ranks 0 to 0"),
    (dict(save="SAVE", profile=True, profile_step_start=7), "--profile-step-start 7 lies beyond the run's last step, 6"),
    (dict(teacher_load="nowhere", kd_steps=3, teacher_micro_batch_size=3), "--teacher-micro-batch-size 3 is not a multiple"),
    (dict(teacher_load="nowhere", kd_steps=3, kd_stop="crossover"), "--kd-stop crossover compares held-out accuracies"),
    (dict(teacher_load="nowhere", kd_steps=3, teacher_tensor_model_parallel_size=2), "--teacher-tensor-model-parallel-size"),
]


@pytest.mark.parametrize("flags, reason", REFUSED, ids=[reason[:60] for _, reason in REFUSED])
def test_a_start_and_a_dry_run_refuse_alike_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], reason: str
) -> None:
    """Neither reads data: what follows the checks is replaced by an error."""
    monkeypatch.chdir(tmp_path)
    words = argv(**dict(data_path="words", train_iters=6, save="SAVE") | flags)
    said = []
    for more in ([], ["--dry-run", "1"]):
        with (
            mock.patch.object(run_module, "run_session", side_effect=AssertionError("it started")),
            mock.patch.object(dry_run, "dry_run", side_effect=AssertionError("it went on")),
        ):
            assert pretrain.main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "Traceback" not in err
        said.append(the_error(err))
    assert said[0] == said[1] and reason in said[0], said
    assert list(tmp_path.iterdir()) == []


def test_flags_that_belong_together_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this test, the tests above could pass for the wrong reason."""
    monkeypatch.chdir(tmp_path)
    flags = dict(WSD, lr_wsd_decay_iters=6, skip_samples=["0:8", "9:12"], keep_last=2, async_save=True, save_at=6) | dict(
        profile=True, profile_step_start=6
    )
    with mock.patch.object(run_module, "run_session") as started, mock.patch.object(dry_run, "dry_run") as rehearsed:
        for more in ([], ["--dry-run", "1"]):
            assert pretrain.main([*argv(data_path="words", train_iters=6, save="SAVE", **flags), *more]) == 0
    assert started.call_count == rehearsed.call_count == 1


def test_ranks_compare_what_their_flags_say_and_not_where_files_lie() -> None:
    def flags(where: str, *data: str, **salt: Any) -> dict[str, object]:
        return run_module.compared_flags(RunConfig(
            data=DataConfig(data_path=tuple(f"{where}/{name}" for name in data)), tokenizer=TokenizerConfig(tokenizer_model=where),
            salt=SaltConfig(teacher_load=where, kd_steps=3, **salt), training=TrainingConfig(outcome_file=where),
            checkpoint=CheckpointConfig(save=where),
        ))  # fmt: skip

    own = flags("/here", "web", "code")
    assert own == flags("/there", "web", "code")
    for other in (flags("/here", "web"), flags("/here", "web", "code", kd_weight=0.5)):
        assert [what for what, value in own.items() if other[what] != value] in (
            ["the number of words in --data-path"], ["--kd-weight"]
        )  # fmt: skip

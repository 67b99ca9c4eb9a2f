"""Layout, steps, microbatches and schedules of a run, from its flags alone, and all checks that need flags of several sections.

Pure: no torch, no file, no other rank. A start and a --dry-run both call `check`, so that they refuse the same with the same words,
before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_salt.config import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SaltConfig,
    TrainingConfig,
    flag,
)
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import UserError
from megatron_salt.model.shapes import check_masking, check_shapes
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.salt.guidance.layer_place import guided_layer
from megatron_salt.salt.routing import check_sequence, teacher_layout

MOST_SAMPLES = 2**62  # positions in an order are int64


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Counts of a run: of the whole run, or of one stage where the stages differ (`in_stage2`)."""

    total_steps: int
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    """Microbatches of one replica in one step."""

    stage2_micro_batch_size: int
    """Micro-batch size from the end of stage 1 on."""

    teacher_merge: int = 1
    """Consecutive microbatches that one forward pass of the teacher takes together."""

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_steps * self.global_batch_size

    @property
    def num_teacher_forwards(self) -> int:
        """Forward passes of the teacher for one replica of the student in one step of stage 1."""
        return self.num_microbatches // self.teacher_merge

    def in_stage2(self) -> RunPlan:
        """The plan of stage 2: the same samples in each step, cut into microbatches of another size."""
        samples, micro = self.num_microbatches * self.micro_batch_size, self.stage2_micro_batch_size
        return replace(self, micro_batch_size=micro, num_microbatches=samples // micro)


def check(config: RunConfig, world_size: int) -> tuple[Layout, RunPlan]:
    """The layout and the plan that the flags ask for. Raises UserError."""
    layout = student_layout(config.parallel, world_size)
    check_shapes(config.model, config.parallel, config.training.seq_length)
    check_masking(config.model, config.data)
    check_teacher(config.salt, config.training, layout)
    plan = plan_run(config.training, config.parallel, layout, config.salt)
    check_guidance(config, plan)
    schedule_lengths(config.optimizer, plan.total_samples, plan.global_batch_size)
    parse_skip_samples(config.training.skip_samples)
    _check_saves(config.checkpoint)
    if config.training.profile:
        _check_profile(config, layout)
    # With --train-samples a checkpoint may change the number of steps, so `rest_of_run` (start.py) asks again.
    if config.training.train_iters is not None or config.checkpoint.load is None:
        refuse_steps_beyond(config, plan.total_steps)
    return layout, plan


def plan_run(training: TrainingConfig, parallel: ParallelConfig, layout: Layout, salt: SaltConfig) -> RunPlan:
    """The counts that the flags ask for. Raises UserError where a batch cannot be cut as asked, or the run has no length."""
    micro, replicas = training.micro_batch_size, layout.data
    global_batch = training.global_batch_size or micro * replicas
    microbatches = _num_microbatches(global_batch, micro, replicas, parallel, flag("micro_batch_size"))
    stage2_micro = salt.stage2_micro_batch_size or micro
    _num_microbatches(global_batch, stage2_micro, replicas, parallel, flag("stage2_micro_batch_size"))
    teacher_micro = salt.teacher_micro_batch_size or micro
    if teacher_micro % micro:
        raise UserError(f"--teacher-micro-batch-size {teacher_micro} is not a multiple of --micro-batch-size {micro}")
    if microbatches * micro % teacher_micro:
        raise UserError(
            f"--teacher-micro-batch-size {teacher_micro} does not divide the {microbatches * micro} samples of a replica "
            f"(--global-batch-size {global_batch} / {replicas} data-parallel replicas)"
        )
    if training.train_samples is not None:
        if training.train_samples % global_batch:
            raise UserError(f"--train-samples {training.train_samples} is not a multiple of --global-batch-size {global_batch}")
        steps = training.train_samples // global_batch
    elif training.train_iters is not None:
        steps = training.train_iters
    else:
        raise UserError("give the run a length: --train-iters or --train-samples")
    if steps * global_batch > MOST_SAMPLES:
        raise UserError(
            f"{steps} steps of --global-batch-size {global_batch} are more samples than can be counted, {MOST_SAMPLES}"
        )
    return RunPlan(
        total_steps=steps,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        num_microbatches=microbatches,
        stage2_micro_batch_size=stage2_micro,
        teacher_merge=teacher_micro // micro,
    )


def _num_microbatches(global_batch: int, micro: int, replicas: int, parallel: ParallelConfig, micro_flag: str) -> int:
    """Microbatches of one replica in one step. micro_flag: the flag that gives `micro`. Raises UserError."""
    if global_batch % (micro * replicas):
        raise UserError(
            f"--global-batch-size {global_batch} is not divisible by {micro_flag} {micro} x {replicas} data-parallel replicas"
        )
    microbatches, stages = global_batch // (micro * replicas), parallel.pipeline_model_parallel_size
    if parallel.virtual_stages is not None and microbatches % stages:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank {parallel.virtual_stages} needs the {microbatches} microbatches of a replica "
            f"(--global-batch-size {global_batch} / {micro_flag} {micro} / {replicas} replicas) to be a multiple of "
            f"--pipeline-model-parallel-size {stages}"
        )
    return microbatches


def check_teacher(salt: SaltConfig, training: TrainingConfig, student: Layout) -> None:
    """Raise UserError where the teacher does not fit the student's layout, or where a crossover could never end stage 1."""
    if salt.teacher_load is None:
        return
    teacher_layout(student, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    check_sequence(student, training.seq_length)
    if salt.kd_stop == "crossover":
        assert salt.kd_steps is not None
        if not training.eval_iters:
            raise UserError("--kd-stop crossover compares held-out accuracies: it needs --eval-iters above 0, got 0")
        if training.eval_interval + salt.kd_transition_steps >= salt.kd_steps:
            raise UserError(
                f"--kd-stop crossover can end nothing: after the first evaluation, at --eval-interval {training.eval_interval}, and "
                f"--kd-transition-steps {salt.kd_transition_steps} stage 1 is over by --kd-steps {salt.kd_steps} anyway"
            )


def check_guidance(config: RunConfig, plan: RunPlan) -> None:
    """Raise UserError where hidden-state guidance names a layer or a step that the run does not have."""
    guided_layer(config.salt, config.model, config.parallel)
    if config.salt.let_steps is not None and config.salt.let_steps > plan.total_steps:
        raise UserError(f"--let-steps {config.salt.let_steps} lies beyond the run's last step, {plan.total_steps}")


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of the phases of the learning rate, in samples."""

    warmup: int
    decay: int
    """From the first sample to the end of the decay, warm-up included."""
    wsd_decay: int | None
    """The final decay of --lr-decay-style WSD; None: its flags are not given."""


def schedule_lengths(optimizer: OptimizerConfig, train_samples: int, global_batch_size: int) -> ScheduleLengths:
    """The phases that the flags ask for. Raises UserError where they do not fit into a run of `train_samples`."""

    def in_samples(iters: int | None, samples: int | None) -> int | None:
        return samples if samples is not None else None if iters is None else iters * global_batch_size

    decay = in_samples(optimizer.lr_decay_iters, optimizer.lr_decay_samples) or train_samples
    warmup = in_samples(optimizer.lr_warmup_iters, optimizer.lr_warmup_samples or None) or 0
    if optimizer.lr_warmup_fraction is not None:
        warmup = int(optimizer.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise UserError(
            f"--lr-warmup-iters (or -samples, -fraction) comes to {warmup} samples, and the decay ends at {decay} "
            "(--lr-decay-iters, or the whole run); the warm-up must be shorter"
        )
    wsd_decay = in_samples(optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_samples)
    if optimizer.lr_decay_style == "WSD" and wsd_decay is not None and wsd_decay > decay:
        raise UserError(f"--lr-wsd-decay-iters comes to {wsd_decay} samples, and the whole decay has {decay}")
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_incr_style == "constant" and (start is not None or end is not None):
        raise UserError(
            f"--start-weight-decay {start} and --end-weight-decay {end} need a --weight-decay-incr-style other than constant"
        )
    return ScheduleLengths(warmup, decay, wsd_decay)


def refuse_steps_beyond(config: RunConfig, total_steps: int) -> None:
    """Raise UserError where --save-at or --profile-step-start is beyond the last step. Steps that a resumed run has already done are
    allowed."""
    beyond = [step for step in config.checkpoint.save_at if step > total_steps]
    if beyond:
        raise UserError(f"--save-at {' '.join(map(str, beyond))} lies beyond the run's last step, {total_steps}")
    training = config.training
    if training.profile and training.profile_step_start > total_steps:
        raise UserError(
            f"--profile-step-start {training.profile_step_start} lies beyond the run's last step, {total_steps}: nothing would be "
            "profiled"
        )


def plan_the_rest(plan: RunPlan, training: TrainingConfig, step: int, consumed_samples: int) -> RunPlan:
    """The plan of a run that goes on after `step`.

    --train-samples gives a length in samples. Where the steps so far had another --global-batch-size, the number of steps changes.
    Raises UserError where the remaining samples are not a whole number of steps.
    """
    if training.train_samples is None:
        return plan
    left = max(0, training.train_samples - consumed_samples)
    if left % plan.global_batch_size:
        raise UserError(
            f"--train-samples {training.train_samples} less the {consumed_samples} samples of the first {step} steps leaves {left}, "
            f"which is not a multiple of --global-batch-size {plan.global_batch_size}"
        )
    return replace(plan, total_steps=step + left // plan.global_batch_size)


def _check_saves(checkpoint: CheckpointConfig) -> None:
    """Raise UserError for flags about saves in a run without --save. (CheckpointConfig allows them: a shared YAML file may hold them.)"""
    if checkpoint.save is not None:
        return
    if checkpoint.keep_last is not None:
        raise UserError(
            f"--keep-last {checkpoint.keep_last} needs --save: without it nothing is saved, so there is nothing to keep"
        )
    for name in ("async_save", "dist_ckpt_optim_fully_reshardable"):
        if getattr(checkpoint, name):
            raise UserError(f"{flag(name)} needs --save: without it nothing is saved")
    if checkpoint.on_save_error != "stop":
        raise UserError(f"--on-save-error {checkpoint.on_save_error} needs --save: without it nothing is saved")


def _check_profile(config: RunConfig, layout: Layout) -> None:
    """Raise UserError for a profile that no rank would write."""
    if config.logging.tensorboard_dir is None and config.checkpoint.save is None:
        raise UserError("--profile has nowhere to write its trace; give --tensorboard-dir or --save")
    absent = [rank for rank in config.training.profile_ranks if rank >= layout.world_size]
    if absent:
        raise UserError(f"--profile-ranks {' '.join(map(str, absent))}: the run has ranks 0 to {layout.world_size - 1}")

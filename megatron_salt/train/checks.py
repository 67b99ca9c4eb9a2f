"""Everything that flags alone can get wrong, beyond one section. Pure: no torch, no file, no other rank.

A start and a --dry-run both call `check`, so that they refuse the same with the same words, before anything is written.
"""

from __future__ import annotations

from megatron_salt.config import CheckpointConfig, RunConfig, flag
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import UserError
from megatron_salt.model.shapes import check_masking, check_shapes
from megatron_salt.parallel.layout import Layout, student_layout
from megatron_salt.train.plan import RunPlan, check_save_at, check_teacher, plan_run, schedule_lengths


def check(config: RunConfig, world_size: int) -> tuple[Layout, RunPlan]:
    """The layout and the plan that the flags ask for. Raises UserError."""
    layout = student_layout(config.parallel, world_size)
    check_shapes(config.model, config.parallel, config.training.seq_length)
    check_masking(config.model, config.data)
    check_teacher(config.salt, config.training, layout)
    plan = plan_run(config.training, config.parallel, layout, config.salt)
    schedule_lengths(config.optimizer, plan.total_samples, plan.global_batch_size)
    parse_skip_samples(config.training.skip_samples)
    _check_saves(config.checkpoint)
    if (
        config.training.train_iters is not None or config.checkpoint.load is None
    ):  # else a checkpoint has a say in the run's length
        check_save_at(config.checkpoint.save_at, plan.total_steps)
    if config.training.profile:
        _check_profile(config, layout)
    return layout, plan


def _check_saves(checkpoint: CheckpointConfig) -> None:
    """Refuse flags about saves in a run that saves nothing. Not a section's check: a shared YAML file may hold them without --save."""
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
    """Refuse a profile that nobody writes."""
    if config.logging.tensorboard_dir is None and config.checkpoint.save is None:
        raise UserError("--profile has nowhere to write its trace; give --tensorboard-dir or --save")
    absent = [rank for rank in config.training.profile_ranks if rank >= layout.world_size]
    if absent:
        raise UserError(f"--profile-ranks {' '.join(map(str, absent))}: the run has ranks 0 to {layout.world_size - 1}")

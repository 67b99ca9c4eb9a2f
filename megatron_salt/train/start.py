"""Where a run begins, and everything that its flags and its files together can get wrong. Not collective; nothing is written.

A start asks on rank 0 before --save is made, and a --dry-run asks too: both refuse the same with the same words. What needs several
ranks, or memory, a start alone can tell.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_salt.checkpoint import compatibility, owner, retention
from megatron_salt.checkpoint.changes import CHANGED, tell
from megatron_salt.checkpoint.compatibility import Found, RunIdentity
from megatron_salt.checkpoint.run_state import Progress
from megatron_salt.config import CheckpointConfig, RunConfig
from megatron_salt.data.held_out import refuse_training_data
from megatron_salt.errors import UserError
from megatron_salt.metrics.run_log import look_at_logs
from megatron_salt.metrics.sinks import require_package
from megatron_salt.model.flops import num_parameters
from megatron_salt.parallel.hardware import GIB
from megatron_salt.parallel.layout import Layout
from megatron_salt.train.build import Inputs, dtype_of, identify, name_data, refuse_large_exchange, stage_of
from megatron_salt.train.optim import build_scheduler
from megatron_salt.train.plan import RunPlan, check_save_at, plan_the_rest

OPTIMIZER_BYTES = 12  # of a parameter: float32 main parameter and both moments


@dataclass(frozen=True)
class Beginning:
    """Where a run begins."""

    identity: RunIdentity
    progress: Progress
    plan: RunPlan
    """Of the whole run, steps that are done included."""
    told: tuple[str, ...]
    """What a user may want to know of changed flags and of --save, a line each."""


def find_beginning(config: RunConfig, layout: Layout, plan: RunPlan, inputs: Inputs, found: Found | None) -> Beginning:
    """Where the run begins, if it can. found: the checkpoint that --load means, None where it has none. Raises UserError."""
    checkpoint, teacher = config.checkpoint, inputs.teacher
    if config.logging.wandb_project is not None:
        require_package("wandb", "--wandb-project")
    if inputs.valid is not None and config.data.valid_data_path and not config.data.allow_valid_in_train:
        train, valid = ([windows.file.prefix for windows in samples.windows] for samples in (inputs.train, inputs.valid))
        refuse_training_data(train, valid)
    identity = identify(config, inputs, name_data(config, plan, inputs))
    progress = _progress(config, layout, plan, identity, found)
    plan = plan_the_rest(plan, config.training, progress.step, progress.consumed_samples)
    check_save_at(checkpoint.save_at, plan.total_steps)
    if found is not None and progress.step >= plan.total_steps:
        refuse_done_elsewhere(checkpoint, found, plan.total_steps)
    salt, _ = stage_of(config.salt, progress if progress.step > 0 else None, teacher)
    if teacher is not None and salt is not None and salt.stage_after(progress.step) == 1:
        refuse_large_exchange(config.salt, config.training, plan, layout, teacher)
    told = tuple(tell(event) for event in progress.events if event["event"] == CHANGED and event["step"] == progress.step)
    if checkpoint.save is not None and progress.step < plan.total_steps:
        padded_vocabulary_size = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
        size = num_parameters(config.model, padded_vocabulary_size, config.training.seq_length) * (
            dtype_of(config.training).itemsize + OPTIMIZER_BYTES
        )
        told += check_save(checkpoint, size / GIB)
    look_at_logs(config.logging, checkpoint.save)
    return Beginning(identity, progress, plan, told)


def _progress(config: RunConfig, layout: Layout, plan: RunPlan, identity: RunIdentity, found: Found | None) -> Progress:
    """What the checkpoint says, if the run can go on with it: `Checkpointer.load` without the tensors."""
    checkpoint = config.checkpoint
    if found is None:
        if checkpoint.load is not None:
            compatibility.refuse_empty(checkpoint.load, checkpoint.save)
        return Progress(0, 0)
    progress = compatibility.take_over(found, identity, checkpoint)
    if checkpoint.finetune:
        return progress
    if not checkpoint.no_load_optim:
        stages = config.parallel.num_virtual_stages_per_pipeline_rank
        compatibility.refuse_other_form(found, config.parallel.use_distributed_optimizer, layout, stages)
    if found.facts["scheduler"] is not None:
        groups: Any = SimpleNamespace(param_groups=[])  # a schedule of nothing
        schedule = build_scheduler(groups, config.optimizer, plan.total_samples, plan.global_batch_size)
        compatibility.schedule_to_load(schedule, found, identity.schedule_follows_run)
    return progress


def refuse_done_elsewhere(checkpoint: CheckpointConfig, found: Found, total: int) -> None:
    """Raise UserError where --load has the run's last step and --save is elsewhere: such a run would be done with nothing in --save."""
    if checkpoint.save is not None and os.path.realpath(found.directory.parent) != os.path.realpath(checkpoint.save):
        raise UserError(
            f"nothing to train: {found.directory} is after step {found.facts['step']} and the run has {total}, so --save "
            f"{checkpoint.save} would get no checkpoint; ask for more steps, or leave --save out"
        )


def check_save(checkpoint: CheckpointConfig, gib: float) -> tuple[str, ...]:
    """Who owns --save, and what it has room for; `gib` is what one checkpoint takes, about.

    Raises UserError where another run surely writes there or has checkpoints there, where it cannot be written or has too little room."""
    assert checkpoint.save is not None
    line = None if checkpoint.take_over_save else owner.refuse_living(Path(checkpoint.save))
    retention.look(checkpoint)
    return (*([] if line is None else [f"save: {line}"]), check_room(checkpoint, gib))


def check_room(checkpoint: CheckpointConfig, gib: float) -> str:
    """What --save has room for; `gib` is what one checkpoint takes, about. Raises UserError where it cannot be written or holds none."""
    assert checkpoint.save is not None
    save = Path(os.path.abspath(checkpoint.save))
    place = next(path for path in (save, *save.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free / GIB
    except OSError as error:
        raise UserError(f"--save {checkpoint.save} cannot be written: {place}: {error.strerror}") from None
    if free < gib:
        raise UserError(f"--save {checkpoint.save} has {free:.1f} GiB free, and one checkpoint takes about {gib:.1f} GiB")
    kept = None if checkpoint.keep_last is None else (checkpoint.keep_last + 1) * gib  # one more while the next is written
    little = kept is not None and free < kept
    return f"save: {free:.1f} GiB free, a checkpoint takes about {gib:.2f} GiB" + (
        f"; WARNING: --keep-last {checkpoint.keep_last} and the one being written take {kept:.1f} GiB" if little else ""
    )

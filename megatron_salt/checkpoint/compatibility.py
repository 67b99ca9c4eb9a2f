"""Whether a checkpoint belongs to a run, and what the run takes over from it.

The checkpoint's state is compared with the run's flags. Another architecture, tokenizer, data or schedule is a UserError that names both
sides, unless a flag says that the difference is meant. Nothing here is collective, and no tensors are read.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields, replace
from typing import Any

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_salt.checkpoint import integrity, save_directory
from megatron_salt.checkpoint.changes import changes_since
from megatron_salt.checkpoint.run_state import OpenedCheckpoint, OptimizerForm, RunState
from megatron_salt.checkpoint.save_directory import RUN_YAML
from megatron_salt.config import CheckpointConfig, ModelConfig, OptimizerConfig, flag
from megatron_salt.errors import UserError
from megatron_salt.files import real_path
from megatron_salt.parallel.layout import Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint must share with the run that resumes from it, and the run's own description."""

    yaml: str
    """The whole configuration, kept for people and tools."""
    architecture: dict[str, Any]
    """ModelConfig's fields and whatever else shapes the model, by field name."""
    tokenizer_fingerprint: str
    data_fingerprint: str
    seed: int
    schedule_follows_run: tuple[str, ...] = ()
    """Names in the schedule's state whose values were derived from the length of the run: see `schedule_follows_run`."""


# ---- comparing with this run -------------------------------------------------------------------------------------------


def refuse_other_run(opened: OpenedCheckpoint, run: RunIdentity, finetune: bool, new_data: bool) -> None:
    """Raise UserError, naming both sides, where the checkpoint belongs to another run than the flags allow. Pure."""
    defaults = {field.name: field.default for field in fields(ModelConfig)}  # an earlier release did not write them all
    saved, current = defaults | opened.state.architecture, json.loads(json.dumps(defaults | run.architecture))
    differences = [
        f"{flag(name)} is {saved.get(name)} there and {current.get(name)} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if finetune:  # the shapes of the tensors decide whether the weights fit
        for difference in differences:
            log.warning("--finetune from another architecture: %s", difference)
        ids, others = run.architecture.get("vocabulary"), opened.state.vocabulary_size
        if ids is not None and others is not None and ids < others:
            log.warning(
                "--finetune takes the rows of this run's %d ids; ids %d to %d of the checkpoint are left out",
                ids,
                ids,
                others - 1,
            )
        elif ids is not None and others is not None and ids > others:
            log.warning(
                "--finetune: the checkpoint has %d ids; ids %d to %d of this run begin with rows that were never trained",
                others,
                others,
                ids - 1,
            )
        if opened.state.tokenizer != run.tokenizer_fingerprint:
            log.warning(
                "--finetune: %s was trained with tokenizer %s, this run has %s; each id keeps its row, whatever it means there",
                opened.directory,
                opened.state.tokenizer,
                run.tokenizer_fingerprint,
            )
        return
    if differences:
        raise UserError(
            f"{opened.directory} holds another architecture: {'; '.join(differences)}; {opened.directory / RUN_YAML} "
            "has the flags that it was trained with"
        )
    if opened.state.tokenizer != run.tokenizer_fingerprint:
        raise UserError(
            f"{opened.directory} was trained with tokenizer {opened.state.tokenizer}, this run has "
            f"{run.tokenizer_fingerprint}; --finetune takes the weights alone"
        )
    if opened.state.data_fingerprint != run.data_fingerprint and not new_data:
        raise UserError(
            f"{opened.directory} was trained on data {opened.state.data_fingerprint}, --data-path is "
            f"{run.data_fingerprint}; --new-data goes on with it, --finetune takes the weights alone"
        )


def refuse_empty(load: str, save: str | None) -> None:
    """Raise UserError for a --load that has no checkpoint and is not where the run itself will save its first. Pure."""
    if save is None or real_path(load) != real_path(save):
        raise UserError(
            f"--load {load} holds no checkpoint; a run starts without one only where --save is the same; "
            "leave --load out to start afresh"
        )


def refuse_other_form(opened: OpenedCheckpoint, is_distributed: bool, layout: Layout, num_chunks: int) -> OptimizerForm:
    """The form of the checkpoint's optimizer state. Raises UserError where flags alone say that it cannot be loaded. Pure.

    is_distributed: whether this run has --use-distributed-optimizer. num_chunks: model chunks of a rank.
    """
    state = opened.state
    if state.optimizer is None:
        raise UserError(f"{opened.directory} has no optimizer state; --no-load-optim or --finetune goes without it")
    form = state.optimizer.form
    if (form == "plain") == is_distributed:
        with_, without = ("this run", "the checkpoint") if form == "plain" else ("the checkpoint", "this run")
        raise UserError(
            f"{opened.directory}: {with_} has --use-distributed-optimizer and {without} has not; "
            "use the same, or resume with --no-load-optim"
        )
    saved, current = (state.layout.tensor, state.layout.pipeline, state.chunks), (layout.tensor, layout.pipeline, num_chunks)
    if form == "dp_reshardable" and saved != current:
        raise not_reshardable(opened, f"was written at {_layout_flags(*saved)}, this run has {_layout_flags(*current)}")
    return form


def not_reshardable(opened: OpenedCheckpoint, problem: str) -> UserError:
    """The error for optimizer state in form dp_reshardable that this run cannot take."""
    return UserError(
        f"the optimizer state in {opened.directory} is in form dp_reshardable and {problem}. Resume it once as it was and "
        "save with --dist-ckpt-optim-fully-reshardable (the save at a run's last step always is), or resume with --no-load-optim"
    )


def _layout_flags(tensor: int, pipeline: int, chunks: int) -> str:
    return (
        f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline} "
        f"--num-virtual-stages-per-pipeline-rank {chunks}"
    )


# ---- where the run goes on ---------------------------------------------------------------------------------------------


def take_over(opened: OpenedCheckpoint, run: RunIdentity, config: CheckpointConfig) -> RunState:
    """Where the run goes on. Raises UserError where the checkpoint is another run's: see `refuse_other_run`. Reads run.yaml.

    The state's events name the other flags that changed.
    """
    refuse_other_run(opened, run, config.finetune, config.new_data)
    if config.finetune:
        return RunState(events=({"event": "finetune", "from": str(opened.directory), "step": opened.state.run.step},))
    state = state_from(opened, run, config.new_data)
    changed = [change.event(state.step) for change in changes_since(opened.directory, run.yaml)]
    return replace(state, events=(*state.events, *changed))


def state_from(opened: OpenedCheckpoint, run: RunIdentity, new_data: bool) -> RunState:
    """Where the run goes on. On other data it draws from the beginning, and the change is recorded. Pure."""
    saved = opened.state
    if saved.data_fingerprint == run.data_fingerprint:
        return saved.run
    assert new_data
    change = {"event": "new_data", "step": saved.run.step, "from": saved.data_fingerprint, "to": run.data_fingerprint}
    return replace(saved.run, position=0, stage2_since=None, events=(*saved.run.events, change))


# ---- the schedule of learning rate and weight decay --------------------------------------------------------------------


def schedule_follows_run(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """Which numbers of the schedule these flags derive from the length of the run: they change with it. Pure."""
    follows = ["wd_incr_steps"]
    if optimizer.lr_decay_iters is None and optimizer.lr_decay_samples is None:
        follows.append("lr_decay_steps")
        if optimizer.lr_warmup_fraction is not None:
            follows.append("lr_warmup_steps")
    return tuple(follows)


_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters, in samples",
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_steps": "--lr-decay-iters, in samples",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters, in samples",
}
"""The flag behind each name in the state of megatron-core's scheduler."""


def _flag_of(name: str) -> str:
    return f" ({_FLAGS[name]})" if name in _FLAGS else ""


def schedule_to_load(scheduler: OptimizerParamScheduler, opened: OpenedCheckpoint, follows: tuple[str, ...]) -> dict[str, Any]:
    """The state that moves this schedule to where the checkpoint's is. Raises UserError where the two are different schedules. Pure.

    --override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler, which the scheduler knows, decide which one holds.
    follows: see `schedule_follows_run`.
    """
    assert opened.state.scheduler is not None
    saved, current = dict(opened.state.scheduler), scheduler.state_dict()
    garbled = [name for name, value in current.items() if name not in saved or not _is_like(saved[name], value)]
    if garbled:
        path = opened.directory / save_directory.STATE
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: its scheduler lacks or garbles {', '.join(garbled)}")
    if not scheduler.use_checkpoint_opt_param_scheduler:
        for name in follows:
            if saved[name] != current[name]:
                log.warning("the run's length changed, and so does %s, from %s to %s samples", name, saved[name], current[name])
                saved[name] = current[name]
    if not (scheduler.use_checkpoint_opt_param_scheduler or scheduler.override_opt_param_scheduler):
        differences = [
            f"{name} is {saved[name]} there and {current[name]} here{_flag_of(name)}"
            for name in current
            if name != "num_steps" and saved[name] != current[name]
        ]
        if differences:
            raise UserError(
                f"{opened.directory} has another schedule: {'; '.join(differences)}. --override-opt-param-scheduler "
                "takes the flags, --use-checkpoint-opt-param-scheduler the checkpoint's"
            )
    return saved


def load_schedule(
    scheduler: OptimizerParamScheduler,
    optimizer: MegatronOptimizer | None,
    opened: OpenedCheckpoint,
    follows: tuple[str, ...],
) -> None:
    """Move the schedule to where the checkpoint's is: see `schedule_to_load`."""
    scheduler.load_state_dict(schedule_to_load(scheduler, opened, follows))
    if optimizer is not None:  # the parameter groups carry a copy of the peak and the floor
        for group in optimizer.param_groups:
            group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
        scheduler.step(increment=0)


def _is_like(saved: Any, current: Any) -> bool:
    """Whether a saved value is of a kind that may stand in the place of the current one."""
    if isinstance(current, int | float):
        return type(saved) in (int, float)
    return saved is None or isinstance(saved, str)

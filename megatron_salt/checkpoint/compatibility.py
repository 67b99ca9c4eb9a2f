"""Whether a checkpoint may be used, and what a run takes over from it.

A checkpoint is opened by all ranks together: each verifies a share of the files, and rank 0 looks at the pickles before
megatron-core does. Then its facts (`state.json`) are held against this run's: another architecture, tokenizer or data is a
UserError that names both sides, unless a flag says what is meant. Functions say whether they are collective.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_salt.checkpoint import evaluated, integrity, retention, safe_unpickle, save_directory, sharded_state
from megatron_salt.checkpoint.changes import RUN_YAML, changes_since
from megatron_salt.checkpoint.run_state import Progress, SaltProgress
from megatron_salt.checkpoint.state import check_state
from megatron_salt.config import CheckpointConfig, OptimizerConfig, flag
from megatron_salt.errors import UserError
from megatron_salt.parallel.collectives import first_problem, from_rank_0, gathered
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.small_files import read_json

log = logging.getLogger(__name__)

FORMAT = 1
_CORE_CONFIG = "metadata.json"
_CORE_CONFIG_HOLDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip
_REQUIRED = (integrity.METADATA, safe_unpickle.COMMON, _CORE_CONFIG, save_directory.STATE)


@dataclass(frozen=True)
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


# ---- facts that a checkpoint carries -----------------------------------------------------------------------------------


def identity_facts(run: RunIdentity) -> dict[str, Any]:
    """The part of state.json that `refuse_other_run` compares."""
    return {"architecture": run.architecture, "tokenizer": run.tokenizer_fingerprint, "data_fingerprint": run.data_fingerprint}


def write_core_files(directory: Path) -> dict[str, integrity.FileSum]:
    """The two small files by which megatron-core, of any release, knows its own checkpoints. There is nothing in them."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return {
        safe_unpickle.COMMON: integrity.write_whole(directory / safe_unpickle.COMMON, buffer.getvalue()),
        _CORE_CONFIG: integrity.write_whole(directory / _CORE_CONFIG, json.dumps(_CORE_CONFIG_HOLDS).encode()),
    }


def _check_core_config(directory: Path) -> None:
    path = directory / _CORE_CONFIG
    try:
        if read_json(path) != _CORE_CONFIG_HOLDS:
            raise ValueError(f"it does not hold {json.dumps(_CORE_CONFIG_HOLDS)}")
    except (OSError, ValueError) as error:
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: {error}") from None


def common_form(form: sharded_state.Form) -> sharded_state.Form:
    """The form that every rank can save in. Collective over all ranks."""
    forms: list[sharded_state.Form] = [form] * dist.get_world_size()
    dist.all_gather_object(forms, form)
    return "fully_reshardable" if "fully_reshardable" in forms else form


def bucket_plans(plan: str, mesh: Mesh) -> dict[str, str]:
    """Every model-parallel rank's `sharded_state.bucket_plan`, by place. Collective over all ranks."""
    plans: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(plans, (_place(mesh), plan))
    return dict(plans)


def _place(mesh: Mesh) -> str:
    return f"pp{mesh.at.pp}.tp{mesh.at.tp}"


# ---- opening -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files are whole and whose pickles are harmless."""

    directory: Path
    facts: dict[str, Any]
    """state.json"""
    sizes: dict[str, tuple[int, ...]]
    """Global size of every tensor, by key."""


def checkpoint_fingerprint(directory: Path) -> str:
    """Names the contents of a whole checkpoint, wherever it lies. Not collective; reads the list of checksums alone."""
    sums = integrity.read_checksums(directory, _REQUIRED)
    return "sha256:" + hashlib.sha256(json.dumps({name: sums[name].sha256 for name in sorted(sums)}).encode()).hexdigest()[:32]


def open_checkpoint(load: Path, fallback: bool, flag_name: str = "--load") -> Found | None:
    """Find and verify what --load (or another flag of that kind) means; None where there is no checkpoint. Collective over all ranks.

    Raises UserError; DamagedCheckpoint where files are not what was written, unless `fallback` and there is one before.
    """
    return _first_whole(
        from_rank_0(lambda: retention.of_one_run(save_directory.candidates(load, fallback, flag_name))),
        fallback,
        flag_name,
        _open,
    )


def glance_at_checkpoint(load: Path, fallback: bool) -> Found | None:
    """The same without a look at anything but state.json, and so without sizes. Not collective."""
    paths = retention.of_one_run(save_directory.candidates(load, fallback))
    return _first_whole(paths, fallback, "--load", lambda directory: Found(directory, read_facts(directory), {}))


def _first_whole(paths: Sequence[Path], fallback: bool, flag_name: str, open_: Callable[[Path], Found]) -> Found | None:
    for number, directory in enumerate(paths, start=1):
        try:
            return open_(directory)
        except integrity.DamagedCheckpoint as error:
            if fallback and number < len(paths):
                log.error("%s: %s\n--load-fallback: trying %s", flag_name, error, paths[number])
                continue
            could = number < len(paths) and flag_name == "--load"
            hint = f"; --load-fallback would resume from {paths[number]} instead" if could else ""
            raise integrity.DamagedCheckpoint(f"{flag_name}: {error}{hint}") from None
    return None


def _open(directory: Path) -> Found:
    sums = from_rank_0(lambda: integrity.read_checksums(directory, _REQUIRED))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = sorted(sums)[rank::world_size]
    damage = [
        line for part in gathered(integrity.damaged_files(directory, {name: sums[name] for name in share})) for line in part
    ]
    if damage:
        raise integrity.DamagedCheckpoint(f"{directory} is damaged: " + "; ".join(damage))

    def read() -> Found:
        facts = read_facts(directory)
        _check_core_config(directory)
        try:
            metadata = safe_unpickle.check_pickles(directory, sums)
        except safe_unpickle.Unreadable as error:
            raise UserError(f"{error}; it was written with torch {facts['torch']}") from None
        return Found(directory, facts, tensor_sizes(metadata))

    return from_rank_0(read)


def tensor_sizes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Global size of every tensor in torch_dist's table of contents. Pure."""
    tables = metadata.state_dict_metadata.items()
    return {key: tuple(entry.size) for key, entry in tables if isinstance(entry, TensorStorageMetadata)}


def read_facts(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint; what an earlier release did not write yet is None. Not collective. Raises UserError.

    DamagedCheckpoint where it is missing or cannot be read, which `open_checkpoint` finds as well.
    """
    path = directory / save_directory.STATE
    try:
        facts = read_json(path, nan=True)
        written = facts["format"]
        if type(written) is int and written == FORMAT:
            check_state(facts)
    except OSError as error:
        raise integrity.DamagedCheckpoint(
            f"{path}: {error.strerror}, so this is no whole checkpoint of megatron_salt"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: {error}") from None
    if type(written) is not int or written != FORMAT:
        raise UserError(f"{path} has format {str(written)[:24]}; this release reads format {FORMAT}")
    return evaluated.with_evaluation(directory, {"probe": None, "salt": None, "extra": {}} | facts)


# ---- holding it against this run ---------------------------------------------------------------------------------------


def refuse_other_run(found: Found, run: RunIdentity, finetune: bool, new_data: bool) -> None:
    """Raise UserError, naming both sides, where the checkpoint belongs to another run than the flags allow. Pure."""
    there, here = found.facts["architecture"], json.loads(json.dumps(run.architecture))
    differences = [
        f"{flag(name)} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if finetune:  # whether the weights fit is seen from their shapes
        for difference in differences:
            log.warning("--finetune from another architecture: %s", difference)
        return
    if differences:
        raise UserError(
            f"{found.directory} holds another architecture: {'; '.join(differences)}; {found.directory / RUN_YAML} "
            "has the flags that it was trained with"
        )
    if found.facts["tokenizer"] != run.tokenizer_fingerprint:
        raise UserError(
            f"{found.directory} was trained with tokenizer {found.facts['tokenizer']}, this run has "
            f"{run.tokenizer_fingerprint}; --finetune takes the weights alone"
        )
    if found.facts["data_fingerprint"] != run.data_fingerprint and not new_data:
        raise UserError(
            f"{found.directory} was trained on data {found.facts['data_fingerprint']}, --data-path is "
            f"{run.data_fingerprint}; --new-data goes on with it, --finetune takes the weights alone"
        )


def refuse_empty(load: str, save: str | None) -> None:
    """Raise UserError for a --load that has no checkpoint and is not where the run itself will save its first. Pure."""
    if save is None or os.path.realpath(load) != os.path.realpath(save):
        raise UserError(
            f"--load {load} holds no checkpoint; a run starts without one only where --save is the same; "
            "leave --load out to start afresh"
        )


def refuse_mismatches(directory: Path, mismatches: list[sharded_state.Mismatch]) -> None:
    """Raise UserError where any rank found tensors that do not fit. Collective over all ranks."""
    shown = "; ".join(map(str, mismatches[:4])) + (f"; and {len(mismatches) - 4} more" if len(mismatches) > 4 else "")
    problem = first_problem(shown or None)
    if problem is not None:
        raise UserError(f"{directory} does not fit this model: {problem}")


def loadable_form(found: Found, optimizer: MegatronOptimizer, plan: str, mesh: Mesh, num_chunks: int) -> sharded_state.Form:
    """The form of the checkpoint's optimizer state. Raises UserError where this run cannot load it. Collective."""
    mine = sharded_state.form_for(optimizer, reshardable=False)
    form = refuse_other_form(found, mine != "plain", mesh.layout, num_chunks)
    if form != "dp_reshardable":
        return form
    saved, problem = found.facts["optimizer"], None
    if first_problem(None if saved["bucket_plans"].get(_place(mesh)) == plan else "another plan") is not None:
        problem = (
            "was written with another split into stages or gradient buckets (--decoder-first-pipeline-num-layers and "
            "its like, --ddp-bucket-size, --overlap-grad-reduce)"
        )
    elif first_problem(None if mine == form else "an empty bucket") is not None:
        problem = f"cannot be cut for {mesh.groups.dp_cp.size()} data- and context-parallel ranks: some would get nothing"
    if problem is not None:
        raise _not_reshardable(found, problem)
    return form


def refuse_other_form(found: Found, is_distributed: bool, layout: Layout, num_chunks: int) -> sharded_state.Form:
    """The form of the checkpoint's optimizer state. Raises UserError where flags alone say that it cannot be loaded. Pure.

    is_distributed: whether this run has --use-distributed-optimizer. num_chunks: model chunks of a rank."""
    saved, then = found.facts["optimizer"], found.facts["layout"]
    if saved is None:
        raise UserError(f"{found.directory} has no optimizer state; --no-load-optim or --finetune goes without it")
    form = saved["form"]
    if (form == "plain") == is_distributed:
        with_, without = ("this run", "the checkpoint") if form == "plain" else ("the checkpoint", "this run")
        raise UserError(
            f"{found.directory}: {with_} has --use-distributed-optimizer and {without} has not; "
            "use the same, or resume with --no-load-optim"
        )
    there = (then["tensor"], then["pipeline"], found.facts["chunks"])
    here = (layout.tensor, layout.pipeline, num_chunks)
    if form == "dp_reshardable" and there != here:
        raise _not_reshardable(found, f"was written at {_layout_flags(*there)}, this run has {_layout_flags(*here)}")
    return form


def _not_reshardable(found: Found, problem: str) -> UserError:
    return UserError(
        f"the optimizer state in {found.directory} is in form dp_reshardable and {problem}. Resume it once as it was and "
        "save with --dist-ckpt-optim-fully-reshardable (the save at a run's last step always is), or resume with --no-load-optim"
    )


def _layout_flags(tensor: int, pipeline: int, chunks: int) -> str:
    return (
        f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline} "
        f"--num-virtual-stages-per-pipeline-rank {chunks}"
    )


# ---- taking over -------------------------------------------------------------------------------------------------------


def take_over(found: Found, run: RunIdentity, config: CheckpointConfig) -> Progress:
    """Where the run goes on, if the checkpoint is of this run as the flags ask: see `refuse_other_run`. Events say which other flags
    changed. Not collective; reads run.yaml."""
    refuse_other_run(found, run, config.finetune, config.new_data)
    if config.finetune:
        return Progress(0, 0, events=({"event": "finetune", "from": str(found.directory), "step": found.facts["step"]},))
    progress = progress_from(found, run, config.new_data)
    changed = [change.event(progress.step) for change in changes_since(found.directory, run.yaml)]
    return replace(progress, events=(*progress.events, *changed))


def progress_from(found: Found, run: RunIdentity, new_data: bool) -> Progress:
    """Where the run goes on. On other data the pools start at their beginning, and the change is recorded. Pure."""
    facts = found.facts
    data, events = facts["data"], tuple(facts["events"])
    if facts["data_fingerprint"] != run.data_fingerprint:
        assert new_data
        change = {"event": "new_data", "step": facts["step"], "from": facts["data_fingerprint"], "to": run.data_fingerprint}
        data, events = {}, (*events, change)
    return Progress(
        facts["step"], facts["consumed_samples"], data, events, facts["extra"], SaltProgress.from_facts(facts["salt"])
    )


def schedule_follows_run(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """Which numbers of the schedule these flags leave to the length of the run: changing the one changes the other. Pure."""
    follows = ["wd_incr_steps"]
    if optimizer.lr_decay_iters is None and optimizer.lr_decay_samples is None:
        follows.append("lr_decay_steps")
        if optimizer.lr_warmup_fraction is not None:
            follows.append("lr_warmup_steps")
    return tuple(follows)


def _is_like(saved: Any, mine: Any) -> bool:
    if isinstance(mine, int | float):
        return type(saved) in (int, float)
    return saved is None or isinstance(saved, str)


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
"""What megatron-core's scheduler calls a flag."""


def _flag_of(name: str) -> str:
    return f" ({_FLAGS[name]})" if name in _FLAGS else ""


def schedule_to_load(scheduler: OptimizerParamScheduler, found: Found, follows: tuple[str, ...]) -> dict[str, Any]:
    """The state that moves this schedule to where the checkpoint's is. Raises UserError where the two are different schedules. Pure.

    --override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler, which the scheduler knows, decide which one holds.
    """
    saved, mine = dict(found.facts["scheduler"]), scheduler.state_dict()
    odd = [name for name, value in mine.items() if name not in saved or not _is_like(saved[name], value)]
    if odd:
        path = found.directory / save_directory.STATE
        raise integrity.DamagedCheckpoint(f"{path}: cannot be read: its scheduler lacks or garbles {', '.join(odd)}")
    if not scheduler.use_checkpoint_opt_param_scheduler:
        for name in follows:
            if saved[name] != mine[name]:
                log.warning("the run's length changed, and so does %s, from %s to %s samples", name, saved[name], mine[name])
                saved[name] = mine[name]
    if not (scheduler.use_checkpoint_opt_param_scheduler or scheduler.override_opt_param_scheduler):
        differences = [
            f"{name} is {saved[name]} there and {mine[name]} here{_flag_of(name)}"
            for name in mine
            if name != "num_steps" and saved[name] != mine[name]
        ]
        if differences:
            raise UserError(
                f"{found.directory} has another schedule: {'; '.join(differences)}. --override-opt-param-scheduler "
                "takes the flags, --use-checkpoint-opt-param-scheduler the checkpoint's"
            )
    return saved


def load_schedule(
    scheduler: OptimizerParamScheduler, optimizer: MegatronOptimizer | None, found: Found, follows: tuple[str, ...]
) -> None:
    """Move the schedule to where the checkpoint's is: see `schedule_to_load`."""
    scheduler.load_state_dict(schedule_to_load(scheduler, found, follows))
    if optimizer is not None:  # the groups carry a copy of the peak and the floor
        for group in optimizer.param_groups:
            group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
        scheduler.step(increment=0)

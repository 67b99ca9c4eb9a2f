"""Decides where a run starts, and refuses mistakes that flags and files make together. Not collective; nothing is written.

A start calls `decide_start` on rank 0 before --save is made, and a --dry-run calls it too: both refuse the same with the same words.
What needs several ranks, or memory, only a start can find.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from megatron_salt.checkpoint import compatibility, owner, retention
from megatron_salt.checkpoint.changes import CHANGED, tell
from megatron_salt.checkpoint.compatibility import RunIdentity, schedule_follows_run
from megatron_salt.checkpoint.run_state import OpenedCheckpoint, RunState
from megatron_salt.cli import to_yaml
from megatron_salt.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_salt.data.batch import passed_positions
from megatron_salt.data.blend import VALID
from megatron_salt.data.duplicate_inputs import refuse_training_data
from megatron_salt.data.samples import Samples
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import UserError
from megatron_salt.files import real_path
from megatron_salt.metrics.run_sinks import refuse_unusable, require_packages
from megatron_salt.model.flops import num_parameters
from megatron_salt.model.precision import TORCH, Precision, student_precision, teacher_precision
from megatron_salt.model.precision_checks import (
    choose_implementation,
    refuse_bf16_layers,
    refuse_machine,
    refuse_precision,
    refuse_shapes,
)
from megatron_salt.model.shapes import layers_per_stage
from megatron_salt.parallel.hardware import GIB, Hardware
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt.shared_vocabulary import refuse_other_ids, refuse_unlike_ids
from megatron_salt.salt.stage1 import decide_salt
from megatron_salt.salt.teacher_cache.manifest import refuse_other
from megatron_salt.salt.teacher_cache.of_run import manifest_of
from megatron_salt.salt.teacher_checkpoint import teacher_parallel
from megatron_salt.selection.selection_file import refuse_other_data
from megatron_salt.train.build_model import build_scheduler, dtype_of
from megatron_salt.train.build_teacher import refuse_large_exchange
from megatron_salt.train.inputs import Inputs
from megatron_salt.train.plan import RunPlan, plan_the_rest, refuse_steps_beyond

OPTIMIZER_BYTES = 12  # of a parameter: float32 main parameter and both moments


@dataclass(frozen=True)
class Precisions:
    """Precision of student and teacher."""

    student: Precision = TORCH
    teacher: Precision = TORCH
    """Set also where there is no teacher."""


PLAIN = Precisions()
"""Plain torch layers for both."""


def choose_precisions(config: RunConfig, plan: RunPlan, teacher: ModelConfig | None, hardware: Hardware) -> Precisions:
    """The precisions that flags and machine give. teacher: its architecture; None without one. Pure. Raises UserError."""
    refuse_machine(hardware)
    implementation = choose_implementation(config.training.transformer_impl, hardware, config.training.bf16)
    masks = config.data.reset_attention_mask
    precisions = Precisions(
        student_precision(config.quantization, implementation, hardware.capability, masks),
        teacher_precision(config.salt, implementation, hardware.capability, masks),
    )
    sharded = config.parallel.use_distributed_optimizer
    refuse_precision(precisions.student, hardware, config.training.bf16, sharded)
    refuse_bf16_layers(precisions.student, config.model.num_layers)
    for micro_batch in {plan.micro_batch_size, plan.stage2_micro_batch_size}:
        refuse_shapes(precisions.student, config.model, config.parallel, config.training.seq_length, micro_batch)
    if teacher is not None:
        refuse_precision(precisions.teacher, hardware, config.training.bf16, sharded)
        for micro_batch in (1, plan.micro_batch_size * plan.teacher_merge):  # verification; training
            refuse_shapes(precisions.teacher, teacher, teacher_parallel(config.salt), config.training.seq_length, micro_batch)
    return precisions


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of a run."""

    identity: RunIdentity
    progress: RunState
    plan: RunPlan
    """Counts of the whole run, steps that are done included."""
    messages: tuple[str, ...]
    """Lines for the user about changed flags, --load and --save."""
    memory_of_load: HostMemory | None
    """None: no optimizer's state is loaded that loads under any layout."""


def told_of_flags(config: RunConfig) -> tuple[str, ...]:
    """What a user may not have meant. Pure."""
    if config.data.valid_data_path and not config.training.eval_iters:
        return ("--valid-data-path is given, and nothing is evaluated on it: --eval-iters is 0",)
    return ()


def decide_start(config: RunConfig, layout: Layout, plan: RunPlan, inputs: Inputs, opened: OpenedCheckpoint | None) -> Start:
    """Decide where the run starts. opened: the checkpoint that --load means; None where there is none. Raises UserError."""
    checkpoint, teacher = config.checkpoint, inputs.teacher
    require_packages(config.logging)
    if config.data.valid_data_path and not config.data.allow_valid_in_train:
        for samples in inputs.valid.values():
            refuse_training_data(*([windows.file.prefix for windows in one.windows] for one in (inputs.train, samples)))
    if config.training.eval_iters:
        refuse_small_sets(inputs.valid, plan.global_batch_size)
    identity = identify(config, inputs, name_data(config, plan, inputs))
    progress = _progress(config, layout, plan, identity, opened)
    plan = rest_of_run(config, plan, progress)
    if opened is not None and progress.step >= plan.total_steps:
        refuse_done_elsewhere(checkpoint, opened, plan.total_steps)
    salt, _ = decide_salt(config.salt, progress if progress.step > 0 else None, teacher)
    if teacher is not None and salt is not None and salt.stage_after(progress.step) == 1:
        refuse_large_exchange(config, plan, layout, teacher.model)
        if config.salt.teacher_cache is not None:
            manifest = manifest_of(config.salt, teacher, inputs.train, dtype_of(config.training), {}, None)
            refuse_other(Path(config.salt.teacher_cache), manifest)
        splits = (inputs.train, *inputs.valid.values())
        if config.salt.has_soft_labels:
            refuse_other_ids(splits, inputs.shared_ids, inputs.tokenizer.vocabulary_size)
        else:
            refuse_unlike_ids((inputs.train,), teacher, inputs.tokenizer)
    messages = tuple(tell(event) for event in progress.events if event["event"] == CHANGED and event["step"] == progress.step)
    messages += told_of_flags(config)
    padded = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
    memory_of_load = None
    if gathers_to_load(checkpoint, opened):
        memory_of_load = host_memory_of_load(config.model, config.parallel, layout, padded, config.training.seq_length)
        messages += (memory_of_load.line,)
    if checkpoint.save is not None and progress.step < plan.total_steps:
        size = num_parameters(config.model, padded, config.training.seq_length) * (
            dtype_of(config.training).itemsize + OPTIMIZER_BYTES
        )
        messages += check_save(checkpoint, size / GIB)
        if config.parallel.use_distributed_optimizer:
            messages += (host_memory_of_save(config.model, config.parallel, layout, padded, config.training.seq_length).line,)
    refuse_unusable(config.logging, checkpoint.save)
    return Start(identity=identity, progress=progress, plan=plan, messages=messages, memory_of_load=memory_of_load)


def rest_of_run(config: RunConfig, plan: RunPlan, progress: RunState) -> RunPlan:
    """The plan of a run that goes on from `progress`. Raises UserError where flags name steps that it does not have. Pure."""
    plan = plan_the_rest(plan, config.training, progress.step, progress.consumed_samples)
    refuse_steps_beyond(config, plan.total_steps)
    return plan


def identify(config: RunConfig, inputs: Inputs, data: str) -> RunIdentity:
    """The facts that a checkpoint must share with this run. data: from `name_data`. Pure."""
    return RunIdentity(
        yaml=to_yaml(config),
        architecture=asdict(config.model)
        | {"seq_length": config.training.seq_length, "vocabulary": inputs.tokenizer.vocabulary_size},
        tokenizer_fingerprint=inputs.tokenizer.fingerprint,
        data_fingerprint=data,
        seed=config.training.seed,
        schedule_follows_run=schedule_follows_run(config.optimizer),
    )


def name_data(config: RunConfig, plan: RunPlan, inputs: Inputs) -> str:
    """Names the data of the run and their order. Not collective; reads blocks of each dataset.

    Raises UserError where a selection was made for other data, or is too small.
    """
    name = f"{inputs.train.fingerprint} in the order of --seed {config.training.seed}"
    stage_samples, stage1_steps = inputs.stage_samples, config.salt.stage1_steps
    if stage_samples is None:
        return name
    assert stage1_steps is not None
    datasets = list(inputs.train.dataset_facts())
    refuse_other_data(stage_samples.selection, datasets, config.training.seq_length, inputs.tokenizer.fingerprint)
    drawn = np.array([min(stage1_steps, plan.total_steps) * plan.global_batch_size])
    passed = int(passed_positions(drawn, parse_skip_samples(config.training.skip_samples))[0])
    stage_samples.refuse_unfit(plan.global_batch_size, passed, has_stage2=stage1_steps < plan.total_steps)
    return f"{name}, {stage_samples.fingerprint}"


def _progress(
    config: RunConfig, layout: Layout, plan: RunPlan, identity: RunIdentity, opened: OpenedCheckpoint | None
) -> RunState:
    """The state that the run starts from: what `Checkpointer.load` does, without the tensors. Raises UserError."""
    checkpoint = config.checkpoint
    if opened is None:
        if checkpoint.load is not None:
            compatibility.refuse_empty(checkpoint.load, checkpoint.save)
        return RunState()
    progress = compatibility.take_over(opened, identity, checkpoint)
    if checkpoint.finetune:
        return progress
    if not checkpoint.no_load_optim:
        stages = config.parallel.num_virtual_stages_per_pipeline_rank
        compatibility.refuse_other_form(opened, config.parallel.use_distributed_optimizer, layout, stages)
    if opened.state.scheduler is not None:
        groups: Any = SimpleNamespace(param_groups=[])  # the schedule alone, without an optimizer
        schedule = build_scheduler(groups, config.optimizer, plan.total_samples, plan.global_batch_size)
        compatibility.schedule_to_load(schedule, opened, identity.schedule_follows_run)
    return progress


def refuse_small_sets(valid: Mapping[str, Samples], global_batch_size: int) -> None:
    """Raise UserError where a named set has fewer samples than a global batch: some would count twice. Pure."""
    for name, samples in valid.items():
        if name != VALID and len(samples) < global_batch_size:
            raise UserError(
                f"--valid-data-path {name.removeprefix(f'{VALID}/')} has {len(samples)} samples of --seq-length "
                f"{samples.windows[0].seq_length}, fewer than --global-batch-size {global_batch_size}; give it more data"
            )


def refuse_done_elsewhere(checkpoint: CheckpointConfig, opened: OpenedCheckpoint, total: int) -> None:
    """Raise UserError where --load has the run's last step and --save is another directory, which would stay empty."""
    if checkpoint.save is not None and real_path(opened.directory.parent) != real_path(checkpoint.save):
        raise UserError(
            f"nothing to train: {opened.directory} is after step {opened.state.run.step} and the run has {total}, so --save "
            f"{checkpoint.save} would get no checkpoint; ask for more steps, or leave --save out"
        )


def check_save(checkpoint: CheckpointConfig, gib: float) -> tuple[str, ...]:
    """Messages about the owner of --save and its free space. gib: about what one checkpoint takes.

    Raises UserError where another run writes there or has checkpoints there, where it cannot be written, or has too little room.
    """
    assert checkpoint.save is not None
    line = None if checkpoint.take_over_save else owner.refuse_living(Path(checkpoint.save))
    retention.refuse_foreign(checkpoint)
    return (*([] if line is None else [f"save: {line}"]), check_room(checkpoint, gib))


def check_room(checkpoint: CheckpointConfig, gib: float) -> str:
    """A message about the free space of --save. gib: about what one checkpoint takes. Raises UserError where that does not fit."""
    assert checkpoint.save is not None
    save = Path(os.path.abspath(checkpoint.save))
    existing = next(path for path in (save, *save.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / GIB
    except OSError as error:
        raise UserError(f"--save {checkpoint.save} cannot be written: {existing}: {error.strerror}") from None
    if free < gib:
        raise UserError(f"--save {checkpoint.save} has {free:.1f} GiB free, and one checkpoint takes about {gib:.1f} GiB")
    kept = None if checkpoint.keep_last is None else (checkpoint.keep_last + 1) * gib  # one more while the next is written
    little = kept is not None and free < kept
    return f"save: {free:.1f} GiB free, a checkpoint takes about {gib:.2f} GiB" + (
        f"; WARNING: --keep-last {checkpoint.keep_last} and the one being written take {kept:.1f} GiB" if little else ""
    )


@dataclass(frozen=True)
class HostMemory:
    """Host memory of a save that loads under any layout, or of loading it."""

    line: str
    """For the log."""
    fits: bool
    """Whether this machine has as much memory as the ranks of a node take."""


def host_memory_of_save(
    model: ModelConfig, parallel: ParallelConfig, layout: Layout, padded_vocabulary_size: int, seq_length: int
) -> HostMemory:
    """What a fully reshardable save of the distributed optimizer takes of the memory of this machine, if it is like the run's nodes."""
    share = parameters_of_rank(model, parallel, padded_vocabulary_size, seq_length)
    largest = padded_vocabulary_size * model.hidden_size // parallel.tensor_model_parallel_size
    gib = reshardable_save_bytes(share, largest, parallel, layout.data * layout.context) / GIB
    also = ", and so does --overlap-grad-reduce" if layout.pipeline == 1 and not parallel.overlap_grad_reduce else ""
    return _on_a_node("a save that loads under any layout (the last one, --save-at) gathers", gib, layout, also)


def gathers_to_load(checkpoint: CheckpointConfig, opened: OpenedCheckpoint | None) -> bool:
    """Whether ranks load an optimizer's state of the form that loads under any layout, and so each the whole of its part. Pure."""
    if opened is None or checkpoint.finetune or checkpoint.no_load_optim or opened.state.optimizer is None:
        return False
    return opened.state.optimizer.form == "fully_reshardable"


def host_memory_of_load(
    model: ModelConfig, parallel: ParallelConfig, layout: Layout, padded_vocabulary_size: int, seq_length: int
) -> HostMemory:
    """What it takes to load such a save, see `host_memory_of_save`."""
    share = parameters_of_rank(model, parallel, padded_vocabulary_size, seq_length)
    return _on_a_node("loading a save that loads under any layout takes about", reshardable_load_bytes(share) / GIB, layout)


def _on_a_node(what: str, gib: float, layout: Layout, also: str = "") -> HostMemory:
    """gib: of each rank. also: another way to need less. Ranks on a node: as torchrun or Slurm says, else 8."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "8"
    ranks = min(int(told), layout.world_size)
    total = psutil.virtual_memory().total / GIB
    line = f"host memory: {what} {gib:.2f} GiB on each rank, {ranks * gib:.2f} GiB on a node of {ranks}; this machine has {total:.2f} GiB"
    if fits := ranks * gib <= total:
        return HostMemory(line, fits)
    smaller = "a larger --tensor-model-parallel-size or --pipeline-model-parallel-size makes it smaller"
    return HostMemory(f"WARNING: {line}; {smaller}{also}", fits)


def parameters_of_rank(model: ModelConfig, parallel: ParallelConfig, padded_vocabulary_size: int, seq_length: int) -> int:
    """Parameters of the tensor- and pipeline-parallel rank that has most, as if tensor parallelism cut all of them. Pure."""

    def of_layers(count: int) -> int:
        return num_parameters(replace(model, num_layers=count), padded_vocabulary_size, seq_length)

    layer = of_layers(2) - of_layers(1)
    matrix = padded_vocabulary_size * model.hidden_size
    tied_copy = parallel.pipeline_model_parallel_size > 1 and not model.untie_embeddings_and_output_weights
    stages = [layer * count for count in layers_per_stage(model, parallel)]
    stages[-1] += matrix * (tied_copy or model.untie_embeddings_and_output_weights)
    stages[0] += of_layers(1) - layer - matrix * model.untie_embeddings_and_output_weights  # the final norm is little
    return max(stages) // parallel.tensor_model_parallel_size


def reshardable_save_bytes(parameters: int, largest: int, parallel: ParallelConfig, num_shards: int) -> int:
    """Most host memory that one rank takes to gather the optimizer's state of its `parameters` from `num_shards` ranks. Pure.

    largest: parameters of the largest matrix of the rank. The memory holds main parameters and both moments as a whole, and for one bucket
    the shards of this rank, and a gathered tensor in pieces and joined, beside the one before it (megatron-core 0.16.1 and 0.19.2,
    `DistributedOptimizer.get_parameter_state_dp_zero`).
    """
    bucket = parameters // parallel.num_virtual_stages_per_pipeline_rank
    if parallel.overlap_grad_reduce and parallel.pipeline_model_parallel_size == 1:  # else there is one bucket a chunk
        bucket = min(bucket, (parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * num_shards)) + largest)
    return OPTIMIZER_BYTES * parameters + OPTIMIZER_BYTES * bucket // num_shards + 3 * 4 * bucket


def reshardable_load_bytes(parameters: int) -> int:
    """Most host memory that one rank takes to load the optimizer's state of its `parameters`, within a tenth. Pure.

    megatron-core makes the whole state of the rank's part, reads it again beside that, and exchanges pieces (0.16.1 and 0.19.2).
    """
    return (2 * OPTIMIZER_BYTES + 4) * parameters

"""What can be known of a run before it has ranks: --dry-run N. One process, without torch.distributed and without a GPU.

Everything that a start reads is read, and held against the run as a start would do it: tokenizer, data, selection, teacher, the
checkpoint to resume from. --save must be a place that can be written and has room. Nothing stays written. What needs several ranks,
or memory, a start alone can tell.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch

from megatron_salt.checkpoint import owner, resume, retention, shelf
from megatron_salt.checkpoint.progress import Progress
from megatron_salt.config import CheckpointConfig, RunConfig
from megatron_salt.errors import UserError
from megatron_salt.model.flops import num_parameters
from megatron_salt.parallel.launch import find_hardware
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt.resumption import salt_from
from megatron_salt.salt.schedule import Schedule
from megatron_salt.train.build import Inputs, dtype_of, identify, name_data, read_inputs
from megatron_salt.train.plan import RunPlan, check_save_at, plan_the_rest
from megatron_salt.train.precisions import choose_precisions

PACKAGES = ("torch", "megatron-core", "transformer-engine")
OPTIMIZER_BYTES = 12  # of a parameter: float32 main parameter and both moments
GIB = 2**30


def dry_run(config: RunConfig, layout: Layout, plan: RunPlan) -> None:
    """Print what the run would be. Raises UserError for what a start would refuse, as far as one process can see it."""
    print("versions:", ", ".join(versions()))
    inputs = read_inputs(config)
    padded = config.model.padded_vocabulary(inputs.tokenizer.vocab_size)
    parameters = num_parameters(config.model, padded, config.training.seq_length)
    sizes = ", ".join(f"{name} {size}" for name, size in layout.sizes.items())
    print(f"model: {parameters / 1e6:.2f}M parameters with a vocabulary of {inputs.tokenizer.vocab_size} on {layout.world_size} ranks: "
          f"{sizes}")
    print(f"step: {plan.global_batch_size} samples of {config.training.seq_length} tokens, "
          f"{plan.num_microbatches} microbatches of {plan.micro_batch_size} a replica")
    print(f"data: {len(inputs.train)} samples, " + ("none" if inputs.valid is None else str(len(inputs.valid))) + " held out")
    if inputs.teacher is not None:
        print(f"teacher: {inputs.teacher.directory}, after {inputs.teacher.step} steps")
    hardware = find_hardware()
    if hardware.capability is None:
        print("precision: not checked, there is no GPU here")
    else:
        print("precision:", choose_precisions(config, plan, None if inputs.teacher is None else inputs.teacher.model, hardware))
    progress = resumption(config, plan, inputs)
    plan = plan_the_rest(plan, config.training, progress.step, progress.consumed_samples)
    check_save_at(config.checkpoint.save_at, plan.total_steps)
    print(f"run: {plan.total_steps} steps, starting after step {progress.step}")
    if config.checkpoint.save is not None:
        if not config.checkpoint.take_over_save and (line := owner.refuse_living(Path(config.checkpoint.save))) is not None:
            print(f"save: {line}")
        retention.look(config.checkpoint)
        print(check_room(config.checkpoint, parameters * (dtype_of(config.training).itemsize + OPTIMIZER_BYTES) / GIB))
    print("dry run: nothing found that would stop this run")


def versions() -> list[str]:
    """Interpreter, machine, packages and GPUs, as they are here."""
    found = [f"Python {platform.python_version()} on {platform.node()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [*found, f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"]


def resumption(config: RunConfig, plan: RunPlan, inputs: Inputs) -> Progress:
    """Where the run would go on. Raises UserError where --load is no checkpoint of this run."""
    checkpoint, salt = config.checkpoint, config.salt
    identity = identify(config, inputs, name_data(config, plan, inputs))
    paths = [] if checkpoint.load is None else shelf.candidates(Path(checkpoint.load), checkpoint.load_fallback)
    if not paths:
        if checkpoint.load is not None:
            resume.refuse_empty(checkpoint.load, checkpoint.save)
        return Progress(0, 0)
    found = resume.Found(paths[0], resume.read_facts(paths[0]), {})
    resume.refuse_other_run(found, identity, checkpoint.finetune, checkpoint.new_data)
    if checkpoint.finetune:
        return Progress(0, 0)
    progress = resume.progress_from(found, identity, checkpoint.new_data)
    schedule, teacher = None if salt.kd_steps is None else Schedule.of(salt), inputs.teacher
    salt_from(
        progress if progress.step > 0 else None, schedule, None if teacher is None else teacher.fingerprint,
        salt.teacher_load if teacher is None else str(teacher.directory), salt.override_kd_schedule,
    )  # fmt: skip
    return progress


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
    return (f"save: {free:.1f} GiB free, a checkpoint takes about {gib:.2f} GiB"
            + (f"; WARNING: --keep-last {checkpoint.keep_last} and the one being written take {kept:.1f} GiB" if little else ""))

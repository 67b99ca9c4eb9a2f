"""--dry-run N: what one process can find out about a run of N ranks, without torch.distributed and without a GPU.

It reads everything that a start reads: tokenizer, data, selection, teacher, the whole checkpoint to resume from. `decide_start`
(start.py) then refuses what it refuses at a start. Nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from megatron_salt.checkpoint.loading import open_checkpoint
from megatron_salt.config import RunConfig
from megatron_salt.config.parallel import Device
from megatron_salt.data.blend import VALID
from megatron_salt.model.flops import num_parameters
from megatron_salt.parallel.hardware import Hardware, refuse_connections
from megatron_salt.parallel.launch import find_hardware
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.machine import naming_faults
from megatron_salt.salt.guidance.what_is_taught import lesson_lines
from megatron_salt.salt.shared_vocabulary import describe_vocabularies
from megatron_salt.salt.stage1 import resumes_in_stage2
from megatron_salt.train.build_model import memory_of_head
from megatron_salt.train.inputs import read_inputs
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.start import choose_precisions, decide_start

PACKAGES = ("torch", "megatron-core", "transformer-engine")


def dry_run(config: RunConfig, layout: Layout, plan: RunPlan, *, plans_memory: bool) -> bool:
    """Print a report of the run to come. Returns whether it goes on in stage 2, without its teacher.

    Raises UserError for what a start would refuse, as far as one process can see. plans_memory: whether the planner follows."""
    hardware = find_hardware()
    refuse_connections(layout.tensor, layout.context, hardware.capability)
    print("versions:", ", ".join(versions()))
    inputs = read_inputs(config)
    padded_vocabulary_size = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
    parameters = num_parameters(config.model, padded_vocabulary_size, config.training.seq_length)
    sizes = ", ".join(f"{name} {size}" for name, size in layout.sizes.items())
    print(
        f"model: {parameters / 1e6:.2f}M parameters with a vocabulary of {inputs.tokenizer.vocabulary_size} on {layout.world_size} ranks: "
        f"{sizes}"
    )
    print(
        f"step: {plan.global_batch_size} samples of {config.training.seq_length} tokens, "
        f"{plan.num_microbatches} microbatches of {plan.micro_batch_size} a replica"
    )
    held_out = ", ".join(f"{len(samples)} held out{of_set(name)}" for name, samples in inputs.valid.items())
    print(f"data: {len(inputs.train)} samples, {held_out or 'none held out'}")
    if inputs.teacher is not None:
        print(f"teacher: {inputs.teacher.directory}, after {inputs.teacher.step} steps")
        shared = inputs.shared_ids if config.salt.has_soft_labels else None
        for line in describe_vocabularies(inputs.teacher, inputs.tokenizer, shared, inputs.train):
            print(line)
    if hardware.capability is None and config.parallel.device != "cpu":
        print("precision: not checked, there is no GPU here")
        if config.parallel.device == "cuda" and torch.version.cuda is None:
            print("WARNING: with this torch, which is built without CUDA, a start with --device cuda is refused")
    else:
        precisions = choose_precisions(config, plan, None if inputs.teacher is None else inputs.teacher.model, hardware)
        teacher = "" if inputs.teacher is None else f"; teacher: {precisions.teacher}"
        print(f"precision: student: {precisions.student}{teacher}")
    for device_type in possible_devices(config.parallel.device, hardware):
        name = {"cpu": "a CPU", "cuda": "a GPU"}[device_type]
        print(f"output head on {name}: {memory_of_head(config, plan, inputs.tokenizer.vocabulary_size, device_type)}")
    load = config.checkpoint.load
    opened = None if load is None else open_checkpoint(Path(load), config.checkpoint.load_fallback)
    start = decide_start(config, layout, plan, inputs, opened)
    if opened is not None:
        print(f"checkpoint: {opened.directory}, every byte as it was written")
    print(f"run: {start.plan.total_steps} steps, starting after step {start.progress.step}")
    if inputs.teacher is not None:
        for line in lesson_lines(config, start.plan.total_steps):
            print(line)
    for line in start.messages:
        print(line)
    if not plans_memory and config.parallel.device != "cpu":
        print("memory of the GPUs: not planned; --gpu names one for that, such as --gpu h100-80")
    follows = "; next, its memory and time on the GPU" if plans_memory else ""
    print(f"dry run: nothing found that would stop this run{follows}")
    resumes = opened is not None and not config.checkpoint.finetune
    return resumes and resumes_in_stage2(start.progress, config.training.eval_iters > 0)


def of_set(name: str) -> str:
    """ " in NAME" for a named set, nothing for the held-out data without a name."""
    return f" in {name.removeprefix(f'{VALID}/')}" if name != VALID else ""


def possible_devices(asked: Device, hardware: Hardware) -> tuple[str, ...]:
    """The types of device on which the run may be. asked: --device. hardware: this machine's, which may not be the run's."""
    if asked != "auto":
        return (asked,)
    return ("cpu", "cuda") if hardware.capability is None else ("cuda",)


def versions() -> list[str]:
    """Versions of Python and the main packages, this machine's name, and its GPUs. Raises MachineError."""
    lines = [f"Python {platform.python_version()} on {platform.node()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"no {name}")
    with naming_faults("a GPU does not tell its name", everything=True):
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [*lines, f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"]

"""From flags to a run that is ready for its first step, in the order in which things can go wrong cheapest first."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu  # noqa: F401  (before megatron)

from megatron_salt.cli import to_yaml
from megatron_salt.config import RunConfig
from megatron_salt.data.batch import Batches, Samples, open_training_data, parse_skip_samples
from megatron_salt.data.choice import tokenizer_of_run
from megatron_salt.data.tokenizer import Tokenizer
from megatron_salt.errors import UserError
from megatron_salt.model.gpt import build_model
from megatron_salt.model.loss import chunk_tokens_for_budget, weight_gradient_bytes
from megatron_salt.parallel.agreement import from_rank_0
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh
from megatron_salt.checkpoint import shelf
from megatron_salt.checkpoint.checkpointer import TOKENIZER, Checkpointer
from megatron_salt.train.optim import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_salt.train.plan import RunPlan, plan_the_rest
from megatron_salt.checkpoint.resume import Progress, RunIdentity, schedule_follows_run
from megatron_salt.train.step import Student

log = logging.getLogger(__name__)

PROBES = 16  # windows of a dataset


@dataclass(frozen=True)
class Inputs:
    """What is read from disk before any rank talks to another."""

    tokenizer: Tokenizer
    train: Samples
    valid: Samples | None


@dataclass(frozen=True)
class Run:
    """Everything the loop needs."""

    student: Student
    plan: RunPlan
    """Of the whole run, steps that are done included."""

    train: Batches
    valid: Batches | None
    checkpointer: Checkpointer
    progress: Progress
    """Where it starts: step 0, or where the checkpoint ends."""


def read_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and data. Every rank, without torch.distributed; O(1) in the size of the data."""
    tokenizer = tokenizer_of_run(config.tokenizer, config.data, _checkpoint_tokenizer(config.checkpoint.load))
    train, valid = open_training_data(config.data, config.training.seq_length, config.training.seed, tokenizer.vocab_size, tokenizer.eod)
    if config.training.eval_iters and valid is None:
        raise UserError(f"--eval-iters {config.training.eval_iters} needs held-out data: give --valid-data-path or --valid-share")
    for samples in (train, valid):
        if samples is not None:
            _probe(samples)
    return Inputs(tokenizer, train, valid)


def _probe(samples: Samples) -> None:
    """Look at a few windows of every dataset, first and last among them: data of another tokenizer is refused here and not hours later."""
    first = 0
    for windows in samples.windows:
        samples.tokens(first + np.unique(np.linspace(0, len(windows) - 1, PROBES).astype(np.int64)))
        first += len(windows)


def build(config: RunConfig, plan: RunPlan, layout: Layout, inputs: Inputs, timeout: timedelta) -> Run:
    """Make the mesh, the student and its optimizer, and load the checkpoint that --load means. Collective over all ranks."""
    mesh = make_student_mesh(layout, config.parallel.virtual_stages, timeout)
    seed_everything(config.training.seed, mesh)
    student = build_student(config, plan, inputs.tokenizer.vocab_size, mesh)
    identity = RunIdentity(
        yaml=to_yaml(config),
        architecture=asdict(config.model) | {"seq_length": config.training.seq_length, "vocabulary": inputs.tokenizer.vocab_size},
        tokenizer_fingerprint=inputs.tokenizer.fingerprint,
        data_fingerprint=f"{from_rank_0(lambda: inputs.train.fingerprint)} in the order of --seed {config.training.seed}",
        seed=config.training.seed,
        schedule_follows_run=schedule_follows_run(config.optimizer),
    )
    checkpointer = Checkpointer(
        config.checkpoint, identity, inputs.tokenizer, mesh, student.chunks, student.optimizer, student.scheduler
    )
    progress = checkpointer.load() or Progress(0, 0)

    def batches(samples: Samples, skip: tuple[str, ...]) -> Batches:
        return Batches(samples, plan.global_batch_size, plan.micro_batch_size, mesh.at.dp, layout.data, parse_skip_samples(skip))

    return Run(
        student=student,
        plan=plan_the_rest(plan, config.training, progress.step, progress.consumed_samples),
        train=batches(inputs.train, config.training.skip_samples),
        valid=None if inputs.valid is None else batches(inputs.valid, ()),
        checkpointer=checkpointer,
        progress=progress,
    )


def build_student(config: RunConfig, plan: RunPlan, vocabulary: int, mesh: Mesh) -> Student:
    """The model with its optimizer and schedule, freshly initialised. Collective over all ranks."""
    training, dtype = config.training, torch.bfloat16 if config.training.bf16 else torch.float32
    rows = config.model.padded_vocabulary(vocabulary) // mesh.layout.tensor
    chunk_tokens = training.loss_chunk_tokens or chunk_tokens_for_budget(training.loss_chunk_mib, rows, dtype)
    model = build_model(config.model, config.parallel, training.seq_length, vocabulary, dtype, chunk_tokens, mesh)
    chunks = wrap_in_ddp(model, config.parallel, mesh)
    optimizer = build_optimizer(chunks, config.optimizer, config.parallel, dtype, mesh)
    scheduler = build_scheduler(optimizer, config.optimizer, plan.total_samples, plan.global_batch_size)
    if mesh.is_last_stage:
        log.info("output head: logits of %d tokens at a time, float32 weight gradient of %.1f MiB",
                 chunk_tokens, weight_gradient_bytes(rows, config.model.hidden_size) / 2**20)
    return Student(chunks, optimizer, scheduler, mesh, training.seq_length, plan.micro_batch_size, plan.global_batch_size)


def count_parameters(student: Student) -> int:
    """Parameters of the whole model, a weight that pipeline stages share counted once. Collective over the model-parallel group."""
    count = sum(
        parameter.numel()
        for chunk in student.chunks
        for parameter in chunk.parameters()
        if not getattr(parameter, "shared", False)
        and (student.mesh.at.tp == 0 or getattr(parameter, "tensor_model_parallel", False))
    )
    total = torch.tensor(count, dtype=torch.int64, device=next(student.chunks[0].parameters()).device)
    dist.all_reduce(total, group=student.mesh.groups.mp)
    return int(total)


def _checkpoint_tokenizer(load: str | None) -> Path | None:
    if load is None:
        return None
    found = shelf.candidates(Path(load), fallback=True)
    return found[0] / TOKENIZER if found else None

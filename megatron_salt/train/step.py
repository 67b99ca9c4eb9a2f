"""One optimizer step: microbatches through the pipeline, gradients made one, parameters moved.

The forward step is a stateless function of (chunk, microbatch). A step whose global gradient norm is not finite leaves parameters and
optimizer untouched on every rank; learning rate and data advance all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.run_log import PhaseTimer
from megatron_salt.model.attention import positions_of
from megatron_salt.model.gpt import GPT
from megatron_salt.model.loss import SoftTarget
from megatron_salt.parallel.device import to_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt.teacher import Teacher


@dataclass(frozen=True)
class Student:
    """The model being trained, as this rank holds it."""

    chunks: list[DistributedDataParallel]
    """One per virtual stage."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    mesh: Mesh
    seq_length: int
    micro_batch_size: int
    global_batch_size: int

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.optimizer.param_groups[0]["lr"]


@dataclass(frozen=True)
class Placed:
    """A microbatch on this rank's device, cut to its context-parallel share of the sequence."""

    tokens: Tensor
    """int64 [b, s/cp]"""
    labels: Tensor
    """int64 [b, s/cp]"""
    loss_mask: Tensor
    """float32 [b, s/cp]"""
    position_ids: Tensor
    """int64 [b, s/cp]"""
    documents: Tensor | None
    """int64 [b, s], of the whole sequence, where attention stays inside documents"""
    target: SoftTarget | None
    """The teacher's part, in stage 1 on the last stage"""


def place(microbatch: Microbatch, mesh: Mesh, target: SoftTarget | None = None) -> Placed:
    """Bring a microbatch to the device."""
    length = microbatch.tokens.size(1)

    def share(tensor: Tensor) -> Tensor:
        if mesh.layout.context > 1:
            tensor = tensor[:, positions_of(length, mesh.layout.context, mesh.at.cp, tensor.device)]
        return to_device(tensor)

    documents = None if microbatch.documents is None else to_device(microbatch.documents)
    return Placed(
        share(microbatch.tokens), share(microbatch.labels), share(microbatch.loss_mask), share(microbatch.position_ids), documents,
        target,
    )  # fmt: skip


def unwrap(chunk: nn.Module) -> GPT:
    """The model inside its data-parallel wrapper."""
    module = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    assert isinstance(module, GPT)
    return module


def forward_step(chunk: nn.Module, batch: Placed) -> tuple[Tensor, LossFunction]:
    """-> (hidden states, the loss function that the last stage calls on them)."""
    model = unwrap(chunk)
    length = batch.tokens.size(1) * model.cp_group.size()
    mask = model.attention_mask(batch.documents, length, batch.tokens.device)
    hidden = chunk(batch.tokens, batch.position_ids, mask)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, metrics = model.loss(hidden, batch.labels, batch.loss_mask, batch.target)
        return total, batch.loss_mask.sum().int(), metrics

    return hidden, loss


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to."""

    grad_norm: float
    """Global, before clipping; the same on every rank."""

    applied: bool
    """Whether parameters moved: the gradient norm was finite."""

    sums: Tensor | None
    """float32 [microbatches, metrics] of this replica's share, on its device; None but on the last stage."""


def train_step(
    student: Student,
    microbatches: Sequence[Microbatch],
    timer: PhaseTimer,
    teacher: Teacher | None = None,
    kd_weight: float = 0.0,
) -> StepOutcome:
    """Carry out one step on this replica's microbatches, with a teacher (stage 1) or without. Collective over all ranks."""
    targets: list[SoftTarget | None] = [None] * len(microbatches)
    if teacher is not None:
        with timer.phase("teacher"):
            targets = teacher.annotate(microbatches, kd_weight)
    with timer.phase("forward-backward"):
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        student.optimizer.zero_grad()
        batches = [place(microbatch, student.mesh, target) for microbatch, target in zip(microbatches, targets, strict=True)]
        sums = run_pipeline(
            student.chunks,
            forward_step,
            batches,
            student.mesh,
            student.seq_length,
            student.micro_batch_size,
            forward_only=False,
        )
        del batches, targets  # the teacher's part of them, before the optimizer needs memory
    with timer.phase("optimizer"):
        grad_norm = finish_step(student)
    return StepOutcome(grad_norm, math.isfinite(grad_norm), torch.stack(sums) if sums else None)


def finish_step(student: Student) -> float:
    """Clip, move parameters where the gradient norm is finite, advance the schedule. Returns the norm. Collective over all ranks.

    megatron-core's own `optimizer.step()` applies a NaN in bfloat16 without a loss scaler, so its parts are called one by one.
    """
    optimizer = student.optimizer
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if math.isfinite(grad_norm):
        for part in optimizer.chained_optimizers:
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        optimizer.step_with_ready_grads()
    student.scheduler.step(increment=student.global_batch_size)
    return grad_norm

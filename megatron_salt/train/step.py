"""One optimizer step: microbatches through the pipeline, gradients reduced over ranks, parameters updated.

The forward step is a stateless function of (chunk, microbatch). A step whose global gradient norm is not finite leaves parameters and
optimizer unchanged on every rank; learning rate and data still advance.
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
from megatron.core.utils import get_model_config

from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.gpt import GPT
from megatron_salt.model.guidance.target import UNTAUGHT, Targets
from megatron_salt.model.guidance.term import Guide
from megatron_salt.model.loss import SoftTarget
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import LossFunction, run_pipeline
from megatron_salt.salt.schedule import PLAIN, StepWeights
from megatron_salt.salt.teacher import Keep, Teacher


@dataclass(frozen=True, kw_only=True)
class Student:
    """This rank's part of the model being trained, with its optimizer."""

    chunks: list[DistributedDataParallel]
    """The model chunks of this rank, one for each virtual stage."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    mesh: Mesh
    seq_length: int
    micro_batch_size: int
    global_batch_size: int

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]


ForwardInput = tuple[Microbatch, SoftTarget | None, Guide | None]
"""What `forward_step` takes: this rank's share of a microbatch, on its device, and the teacher's parts of it."""


def forward_input(microbatch: Microbatch, mesh: Mesh, targets: Targets = UNTAUGHT) -> ForwardInput:
    """Bring this rank's share of a microbatch to its device."""
    share = microbatch.to_device(mesh.layout.context, mesh.at.cp)
    return share, targets.soft, None if targets.hidden is None else Guide.of(targets.hidden, share.loss_mask)


def unwrap(chunk: nn.Module) -> GPT:
    """The model inside its data-parallel wrapper."""
    module = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
    assert isinstance(module, GPT)
    return module


def forward_step(chunk: nn.Module, taught: ForwardInput) -> tuple[Tensor, LossFunction]:
    """-> (hidden states, the loss function that the last stage calls on them)."""
    batch, soft, guide = taught
    model = unwrap(chunk)
    hidden = chunk(*model.inputs(batch), guide)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, metrics = model.loss(hidden, batch.labels, batch.loss_mask, soft)
        return total, batch.loss_mask.sum().int(), metrics

    return hidden, loss


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step."""

    grad_norm: float
    """Global gradient norm before clipping; the same on every rank."""

    applied: bool
    """Whether parameters were updated, because the gradient norm was finite."""

    sums: Tensor | None
    """float32 [microbatches, metrics], sums over this replica's share, on its device; None except on the last stage."""

    guide_sums: Tensor | None = None
    """float32 [GUIDE_METRICS], sums over this rank's tokens after the guided layer, on its device. None on other stages, without guidance,
    and where another rank of the tensor-parallel group tells of the same tokens."""


def train_step(
    student: Student,
    microbatches: Sequence[Microbatch],
    timer: PhaseTimer,
    teacher: Teacher | None = None,
    weights: StepWeights = PLAIN,
    keep: Keep | None = None,
) -> StepOutcome:
    """Carry out one step on this replica's microbatches, with a teacher (stage 1) or without. Collective over all ranks.

    weights: of what the teacher teaches in this step. keep: takes what the teacher computes, for a cache."""
    targets = [UNTAUGHT] * len(microbatches)
    if teacher is not None:
        with timer.phase("teacher"):
            targets = teacher.annotate(microbatches, weights, keep)
    with timer.phase("forward-backward"):
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        student.optimizer.zero_grad()
        batches = [
            forward_input(microbatch, student.mesh, target) for microbatch, target in zip(microbatches, targets, strict=True)
        ]
        sums = run_pipeline(
            student.chunks,
            forward_step,
            batches,
            student.mesh,
            student.seq_length,
            student.micro_batch_size,
            forward_only=False,
        )
        own_tokens = student.mesh.at.tp == 0 or get_model_config(student.chunks[0]).sequence_parallel
        guide_sums = [guide.sums for _, _, guide in batches if guide is not None and own_tokens]
        del batches, targets  # frees the teacher's hidden states before the optimizer needs memory
    with timer.phase("optimizer"):
        grad_norm = finish_step(student)
    return StepOutcome(
        grad_norm,
        math.isfinite(grad_norm),
        torch.stack(sums) if sums else None,
        torch.stack(guide_sums).sum(0) if guide_sums else None,
    )


def finish_step(student: Student) -> float:
    """Clip, update parameters where the gradient norm is finite, advance the schedule. Returns the norm. Collective over all ranks.

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

"""The precision of the run's two models: chosen by flags and machine, and refused before ranks join where it cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.config import ModelConfig, RunConfig
from megatron_salt.model.precision import TORCH, Precision, student_precision, teacher_precision
from megatron_salt.model.precision_checks import (
    choose_implementation,
    refuse_bf16_layers,
    refuse_machine,
    refuse_precision,
    refuse_shapes,
)
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.salt.load_teacher import teacher_parallel
from megatron_salt.train.plan import RunPlan


@dataclass(frozen=True)
class Precisions:
    """Of student and teacher."""

    student: Precision = TORCH
    teacher: Precision = TORCH
    """Whether there is a teacher or not."""


PLAIN = Precisions()
"""Plain torch layers for both."""


def choose_precisions(config: RunConfig, plan: RunPlan, teacher: ModelConfig | None, hardware: Hardware) -> Precisions:
    """By --transformer-impl, --fp8-*, --fp4-* and --teacher-fp8-*. teacher: its architecture, where one teaches. Pure. Raises UserError."""
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
        for micro_batch in (
            1,
            plan.micro_batch_size * plan.teacher_merge,
        ):  # as it is looked at on admission, and as it teaches
            refuse_shapes(precisions.teacher, teacher, teacher_parallel(config.salt), config.training.seq_length, micro_batch)
    return precisions

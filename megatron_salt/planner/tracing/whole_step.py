"""A whole step of one rank, with all its microbatches, and the most bytes at one time: what the composed figure must agree with.

`peak_of_step` runs wherever torch.distributed is joined: in a fake world, or in the ranks of a test. The weights mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint import rng
from megatron_salt.data.batch import Microbatch
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.model.precision import TORCH
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Coordinates, Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh, make_teacher_mesh, new_group_of
from megatron_salt.planner.planned_run import PlannedRun, PlannedTeacher
from megatron_salt.planner.tracing.fake_world import fake_tensors, fake_world
from megatron_salt.planner.tracing.gpu_forms import gpu_forms
from megatron_salt.planner.tracing.meter import Meter
from megatron_salt.salt.guidance.layer_place import guided_layer
from megatron_salt.salt.load_teacher import build_body
from megatron_salt.salt.routing import teacher_layout
from megatron_salt.salt.schedule import PLAIN, Schedule
from megatron_salt.salt.teacher import Teacher
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint
from megatron_salt.train.build_model import build_student, dtype_of
from megatron_salt.train.step import Student, train_step

_LIMIT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class WholeStep:
    """A step to trace."""

    run: PlannedRun
    place: int
    """Which rank: its number in the first block"""
    taught: bool
    """Whether it is a step of stage 1"""


def trace_step(step: WholeStep) -> int:
    """The peak bytes of a step on fake tensors. In a child process."""
    run = step.run
    forms = gpu_forms(run.precision) if run.device == "cuda" else contextlib.nullcontext()
    keep_state = mock.patch.object(rng, "restore", _leave)  # states of random generators that are fake
    with fake_world(run.layout.world_size, rank_of_place(run.layout, step.place)), forms, keep_state:
        return peak_of_step(run, step.taught, fake=True)


def _leave(*_: object) -> None:
    """In place of `rng.restore`. It keeps no state alive, as a Mock would, which remembers its calls."""


def rank_of_place(layout: Layout, place: int) -> int:
    """The rank at a place of the first block."""
    tp_cp, pp = place % (layout.tensor * layout.context), place // (layout.tensor * layout.context)
    return layout.rank(Coordinates(tp=tp_cp % layout.tensor, cp=tp_cp // layout.tensor, dp=0, pp=pp))


def peak_of_step(run: PlannedRun, taught: bool, fake: bool = False) -> int:
    """The most bytes of tensors that are alive in the second step of this rank. Collective over all ranks.

    taught: with the run's teacher. fake: on fake tensors, which the groups of a world do not need."""
    layout, config = run.layout, run.config
    plan = run.plan if taught else run.plan.in_stage2()
    mesh = make_student_mesh(layout, config.parallel.virtual_stages)
    groups = None
    if taught:
        salt = config.salt
        taught_layout = teacher_layout(
            layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size
        )
        groups = make_teacher_mesh(taught_layout), new_group_of(layout.groups("tp", "cp", "pp"), _LIMIT, "block of the teacher")
    seed_everything(1, mesh)
    with fake_tensors() if fake else contextlib.nullcontext(), Meter() as meter:
        student = build_student(config, plan, run.vocabulary_size, mesh, TORCH)
        teacher = None
        if groups is not None:
            assert run.teacher is not None
            teacher = _teacher(run, run.teacher, student, *groups)
        weights = PLAIN if teacher is None else Schedule.of(config.salt).weights_at(1, 1)
        if layout.context > 1:  # whole samples stay on the host, and a rank's own positions are copied
            with meter.untracked():
                batches = [_microbatch(run, plan.micro_batch_size) for _ in range(plan.num_microbatches)]
            meter.known([one for batch in batches for one in vars(batch).values() if isinstance(one, torch.Tensor)])
        else:
            batches = [_microbatch(run, plan.micro_batch_size) for _ in range(plan.num_microbatches)]
        for _ in range(2):
            gc.collect()
            meter.peak()
            train_step(student, batches, PhaseTimer(), teacher, weights)
        return meter.peak()


def _teacher(run: PlannedRun, planned: PlannedTeacher, student: Student, mesh: Mesh, block_group: dist.ProcessGroup) -> Teacher:
    dtype = dtype_of(run.config.training)
    record = TeacherCheckpoint(
        directory=Path("."), model=planned.model, vocabulary_size=planned.vocabulary_size, seq_length=run.config.training.seq_length,
        tokenizer_fingerprint="", fingerprint="", lengths=(), losses=(), dtype="", step=0,
    )  # fmt: skip
    body = build_body(record, run.config.salt, mesh, dtype, TORCH)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.zero_()
    has_head = student.mesh.is_last_stage and run.head_teacher is not None
    weight = torch.zeros((run.rows, planned.model.hidden_size), dtype=dtype) if has_head else None
    return Teacher(
        body, weight, mesh, student.mesh, block_group, microbatches_per_forward=run.plan.teacher_merge,
        temperature=run.config.salt.kd_teacher_temperature,
        guided=guided_layer(run.config.salt, run.config.model, run.config.parallel),
    )  # fmt: skip


def _microbatch(run: PlannedRun, samples: int) -> Microbatch:
    shape = (samples, run.config.training.seq_length)
    documents = torch.zeros(shape, dtype=torch.int64) if run.config.data.reset_attention_mask else None
    return Microbatch(
        tokens=torch.zeros(shape, dtype=torch.int64), labels=torch.zeros(shape, dtype=torch.int64), loss_mask=torch.ones(shape),
        position_ids=torch.zeros(shape, dtype=torch.int64), documents=documents, sample_ids=np.arange(samples),
    )  # fmt: skip

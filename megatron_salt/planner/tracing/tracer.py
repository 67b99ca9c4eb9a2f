"""Traces chunks of the real model on fake tensors in a fake world, in a child process (`run_tracer.py`).

Each chunk has three layers, and the one in the middle stands for all. Transformer Engine cannot run on fake tensors: torch's layers are
traced in its place, with the forms of `gpu_forms.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.config import ModelConfig, ParallelConfig
from megatron_salt.data.batch import Microbatch
from megatron_salt.model import gpt
from megatron_salt.model.gpt import GPT
from megatron_salt.model.loss import SoftTarget
from megatron_salt.model.precision import TORCH
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh, make_teacher_mesh
from megatron_salt.planner.trace import (
    NOTHING,
    ChunkTrace,
    Part,
    StudentRequest,
    TeacherRequest,
    Traces,
    TraceSetting,
    TraceTask,
    alone,
)
from megatron_salt.planner.tracing.fake_world import fake_tensors, fake_world
from megatron_salt.planner.tracing.gpu_forms import gpu_forms
from megatron_salt.planner.tracing.meter import Meter
from megatron_salt.train.build_model import wrap_in_ddp

LAYERS, MIDDLE = 3, 1


class Marks:
    """Cuts what a meter counts into parts. A part begins at its mark and ends at the next one."""

    def __init__(self, meter: Meter) -> None:
        self.parts: dict[str, Part] = {}
        self.starts: dict[str, int] = {}
        self._meter, self._name, self._start = meter, "", 0

    def begin(self, name: str) -> None:
        """End the part before, and begin another. "" begins what nobody asks for."""
        peak = self._meter.peak()
        if self._name:
            self.parts[self._name] = Part(peak - self._start, self._meter.live - self._start)
        self._name, self._start = name, self._meter.live
        self.starts[name] = self._start


def mark_parts(model: GPT, marks: Marks) -> None:
    """Let every pass of a model set marks: "embedding", "layer 0", ... and "head" forward, the same with "backward" the other way."""

    def at_gradient(name: str) -> Callable[[Tensor], None]:
        return lambda _: marks.begin(name)

    def after_embedding(module: nn.Module, _: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(at_gradient("embedding backward"))

    def before_layer(number: int) -> Callable[..., None]:
        return lambda *_: marks.begin(f"layer {number}")

    def after_layer(number: int) -> Callable[..., None]:
        def mark(module: nn.Module, _: object, output: tuple[Tensor, object]) -> None:
            if output[0].requires_grad:
                output[0].register_hook(at_gradient(f"layer {number} backward"))
            if number == LAYERS - 1:
                marks.begin("head")

        return mark

    if model.pre_process:
        model.embedding.register_forward_hook(after_embedding)
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(before_layer(number))
        layer.register_forward_hook(after_layer(number))


def fake_batch(setting: TraceSetting, samples: int, context: int) -> Microbatch:
    """A microbatch of one context-parallel rank, on its device."""
    shape = (samples, setting.seq_length // context)
    return Microbatch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        labels=torch.zeros(shape, dtype=torch.int64),
        loss_mask=torch.ones(shape),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        documents=torch.zeros((samples, setting.seq_length), dtype=torch.int64) if setting.documents else None,
        sample_ids=np.arange(samples),
    )


def three_layers(
    model: ModelConfig, parallel: ParallelConfig, setting: TraceSetting, mesh: Mesh, *, first: bool, last: bool, has_head: bool,
    vocabulary_size: int,
) -> GPT:  # fmt: skip
    """A chunk of a model with LAYERS layers, of the run's own modules."""
    small = replace(model, num_layers=LAYERS)
    return GPT(
        gpt.transformer_config(small, parallel, dtype_of(setting), TORCH), small, vocabulary_size=vocabulary_size,
        seq_length=setting.seq_length, chunk_tokens=setting.chunk_tokens, groups=mesh.groups, pre_process=first, post_process=last,
        vp_stage=None, has_head=has_head,
    )  # fmt: skip


def dtype_of(setting: TraceSetting) -> torch.dtype:
    """The dtype of parameters and activations."""
    return torch.bfloat16 if setting.bf16 else torch.float32


def trace_student(setting: TraceSetting, request: StudentRequest, mesh: Mesh) -> ChunkTrace:
    """Trace a chunk of the student over one microbatch, forward and backward. The second of two passes counts."""
    parallel, dtype, model = alone(setting.parallel), dtype_of(setting), setting.model
    with Meter() as meter:
        marks = Marks(meter)
        chunk = three_layers(
            model, parallel, setting, mesh, first=request.first, last=request.last, has_head=True,
            vocabulary_size=setting.vocabulary_size,
        )  # fmt: skip
        [wrapped] = wrap_in_ddp([chunk], parallel, mesh)
        mark_parts(chunk, marks)
        batch = fake_batch(setting, request.samples, parallel.context_parallel_size)
        length = setting.seq_length // parallel.context_parallel_size
        if parallel.sequence_parallel:
            length //= parallel.tensor_model_parallel_size
        shape = (length, request.samples, model.hidden_size)
        target = None
        if request.teacher_hidden is not None:
            own = setting.seq_length // (parallel.context_parallel_size * parallel.tensor_model_parallel_size)
            rows = model.padded_vocabulary_size(setting.vocabulary_size) // parallel.tensor_model_parallel_size
            target = SoftTarget(
                torch.zeros((own, request.samples, request.teacher_hidden), dtype=dtype),
                torch.zeros((rows, request.teacher_hidden), dtype=dtype), 0.25, 0.667,
            )  # fmt: skip
        received = torch.zeros(shape, dtype=dtype).requires_grad_()  # from the stage before
        gradient = torch.zeros(shape, dtype=dtype)  # from the stage after
        before = meter.live
        for _ in range(2):
            kept = meter.live - before
            received.grad = None
            if not request.first:
                chunk.set_input_tensor(received)
            marks.begin("embedding")
            output = wrapped(*chunk.inputs(batch))
            if request.last:
                output, _sums = chunk.loss(output, batch.labels, batch.loss_mask, target)
                marks.begin("head backward")
                output.backward()
                del _sums
            else:
                marks.begin("head backward")
                output.backward(gradient)
            marks.begin("")
            del output
    return _chunk_trace(marks, shape, dtype, kept)


@torch.no_grad()
def trace_teacher(setting: TraceSetting, request: TeacherRequest, mesh: Mesh) -> ChunkTrace:
    """Trace the teacher's layers over one forward pass."""
    dtype = dtype_of(setting)
    parallel = ParallelConfig(tensor_model_parallel_size=request.tensor)
    with Meter() as meter:
        marks = Marks(meter)
        body = three_layers(
            request.model,
            parallel,
            setting,
            mesh,
            first=True,
            last=True,
            has_head=False,
            vocabulary_size=request.vocabulary_size,
        ).eval()
        mark_parts(body, marks)
        batch = fake_batch(setting, request.samples, 1)
        before = meter.live
        for _ in range(2):
            kept = meter.live - before
            marks.begin("embedding")
            output = body(*body.inputs(batch))
            marks.begin("")
            del output
    return _chunk_trace(marks, (setting.seq_length, request.samples, request.model.hidden_size), dtype, kept)


def _chunk_trace(marks: Marks, hidden: tuple[int, int, int], dtype: torch.dtype, kept: int) -> ChunkTrace:
    def part(name: str) -> Part:
        return marks.parts.get(name, NOTHING)

    return ChunkTrace(
        embedding=part("embedding"), layer=part(f"layer {MIDDLE}"), head=part("head"), head_backward=part("head backward"),
        layer_backward=part(f"layer {MIDDLE} backward"), embedding_backward=part("embedding backward"),
        hidden=int(np.prod(hidden)) * dtype.itemsize, kept=kept,
        before_layer=marks.starts[f"layer {MIDDLE}"] - marks.starts["embedding"],
    )  # fmt: skip


def trace_all(task: TraceTask) -> Traces:
    """All traces of a task. The world has the student's tp x cp ranks as many times as the teacher has tp ranks."""
    parallel = task.setting.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    times = 1 if task.teacher is None else task.teacher.tensor
    forms = gpu_forms(task.setting.precision) if task.device == "cuda" else contextlib.nullcontext()
    with fake_world(tensor * context * times, rank=0):
        mesh = make_student_mesh(Layout(tensor, context, times, 1))
        taught = None if task.teacher is None else make_teacher_mesh(Layout(times, 1, tensor * context, 1))
        seed_everything(1, mesh)
        with fake_tensors(), forms:
            student = {request: trace_student(task.setting, request, mesh) for request in task.student}
            teacher = None if task.teacher is None or taught is None else trace_teacher(task.setting, task.teacher, taught)
    return Traces(student=student, teacher=teacher)

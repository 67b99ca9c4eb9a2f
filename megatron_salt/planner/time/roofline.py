"""The time of a step in both stages: an estimate from FLOPs, bytes of memory, bytes on links and the pipeline's order of passes. Pure.

Arithmetic and memory are those of start-up's prediction (`salt/cost.py`). This module adds what that leaves out: communication, the
filling and draining of the pipelines, and the teacher's exchange. docs/planner.md says which transfers are taken to be hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.config import ParallelConfig
from megatron_salt.config.teaching import gate_kind
from megatron_salt.model.flops import body_flops, core_attention_flops, flops_per_token, head_flops, layer_flops
from megatron_salt.model.loss_chunk import chunk_tokens
from megatron_salt.planner.chunk_memory import chunks_of_stage
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.static import MAIN_BYTES, MOMENT_BYTES, stage_tensors, student_bytes
from megatron_salt.planner.time.machine import Machine
from megatron_salt.planner.time.timeline import ChunkSeconds, busiest_seconds, passes_seconds
from megatron_salt.planner.time.traffic import (
    Phase,
    Transfer,
    boundary_bytes,
    first_group,
    microbatch_tokens,
    microbatches,
    planned_teacher_layout,
    student_transfers,
    teacher_transfers,
)
from megatron_salt.salt.cost import Prediction, largest_share, predict, recomputed_layers, stage_seconds
from megatron_salt.salt.head_cost import HeadShape, head_seconds
from megatron_salt.salt.layer_cost import UPDATE_BYTES, embedding_bytes, layer_seconds
from megatron_salt.salt.schedule import is_tempered

ZEROED_BYTES = 4
"""Of UPDATE_BYTES, those that every rank moves for each parameter, also where the optimizer is sharded: its gradient buffer is zeroed."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """A pipeline stage in a step."""

    layers: int
    chunks: tuple[ChunkSeconds, ...]
    """Seconds of a microbatch in each chunk, with the transfers that nothing hides"""
    flops: float
    """FLOPs of a rank in a step, recomputed ones included"""
    transfers: tuple[Transfer, ...]

    def seconds(self, group: str) -> float:
        """Seconds of a step on the links of a group."""
        return sum(transfer.seconds for transfer in self.transfers if transfer.group == group)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of the parts of a step, one after another."""

    stages: tuple[StageTime, ...]
    delay: float
    """From the end of a pass to the arrival of what it sends, where the schedule hides the transfer"""
    teacher: float
    """The teacher's forward passes and their transfers; 0 in stage 2"""
    exchange: float
    """The exchange of hidden states; 0 in stage 2"""
    passes: float
    """The student's passes"""
    bubble: float
    """Of them, those in which the busiest stage waits"""
    gradients: float
    """Sums of gradients over data-parallel ranks, and new parameters, as far as nothing hides them"""
    update: float
    """The optimizer"""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.teacher + self.exchange + self.passes + self.gradients + self.update


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Times of a run's steps."""

    stage1: StepTime | None
    """None without a teacher"""
    stage2: StepTime
    evaluation: float
    """Seconds of the evaluation of one global batch. The head's gradients count, which an evaluation does not compute"""
    teacher_transfers: tuple[Transfer, ...]
    """Of a step whose samples no cache holds"""
    tokens: int
    """Tokens of a step"""
    model_flops: float
    """FLOPs of the student in a step, without recomputation"""
    teacher_flops: float
    """FLOPs of the teacher in a step of stage 1"""
    balance: Prediction | None
    """What start-up tells of the cost of stage 1, and the number of layers in the last stage that is best; None without a teacher"""


def run_time(run: PlannedRun, machine: Machine) -> RunTime:
    """Times of the steps of both stages."""
    length, plan = run.config.training.seq_length, run.plan
    padded = run.config.model.padded_vocabulary_size(run.vocabulary_size)
    tokens = plan.global_batch_size * length
    taught = run.teacher
    teacher_token = 0.0 if taught is None else body_flops(taught.model, length) * (1.0 - run.cached_share)
    if run.head_teacher is not None:
        teacher_token += head_flops(run.head_teacher.model, padded)
    stage2 = step_time(run, machine, taught=False)
    forward = [[ChunkSeconds(chunk.forward, 0.0) for chunk in stage.chunks] for stage in stage2.stages]
    return RunTime(
        stage1=None if taught is None else step_time(run, machine, taught=True),
        stage2=stage2,
        evaluation=passes_seconds(forward, microbatches(run, False), stage2.delay),
        teacher_transfers=tuple(teacher_transfers(run, machine)) if run.cached_share < 1 else (),
        tokens=tokens,
        model_flops=tokens * flops_per_token(run.config.model, length, padded),
        teacher_flops=tokens * teacher_token,
        balance=None if taught is None else _balance(run, machine),
    )


def step_time(run: PlannedRun, machine: Machine, *, taught: bool) -> StepTime:
    """The time of a step of stage 1 (taught) or stage 2."""
    stages = [_stage_time(run, machine, stage, taught=taught) for stage in range(run.layout.pipeline)]
    chunks = [stage.chunks for stage in stages]
    interleaved = run.config.parallel.virtual_stages is not None
    count = microbatches(run, taught)
    boundary = boundary_bytes(run, taught) / machine.link(first_group(run.layout, "pp")) if interleaved else 0.0
    passes = passes_seconds(chunks, count, boundary)
    body, exchange = _teacher_seconds(run, machine) if taught else (0.0, 0.0)
    return StepTime(
        stages=tuple(stages), delay=boundary, teacher=body, exchange=exchange, passes=passes,
        bubble=passes - count * busiest_seconds(chunks),
        gradients=max(_exposed(stage, run.config.parallel) for stage in stages), update=_update_seconds(run, machine),
    )  # fmt: skip


def head_shape(run: PlannedRun, taught: bool) -> HeadShape:
    """The head's work for one microbatch on a rank of the last stage."""
    training, model = run.config.training, run.config.model
    return HeadShape(
        rows=run.rows, hidden=model.hidden_size, teacher_hidden=0 if run.teacher is None else run.teacher.model.hidden_size,
        tokens=microbatch_tokens(run, taught), chunk_tokens=chunk_tokens(training, run.rows, run.device), itemsize=run.itemsize,
        kernels=run.device == "cuda", tempered=is_tempered(run.config.salt),
        gate=gate_kind(run.config.salt.kd_gate),
    )  # fmt: skip


def _stage_time(run: PlannedRun, machine: Machine, stage: int, *, taught: bool) -> StageTime:
    model, parallel, length = run.config.model, run.config.parallel, run.config.training.seq_length
    rates, count = machine.rates, microbatches(run, taught)
    chunks = chunks_of_stage(model, parallel, stage)
    layers = sum(chunk.layers for chunk in chunks)
    tokens = microbatch_tokens(run, taught) / run.layout.tensor
    fused = run.precision.implementation == "transformer_engine"
    forward = layers * tokens * layer_seconds(model, length, run.itemsize, fused, rates.layers)
    backward = tokens * stage_seconds(model, parallel, layers, length, run.itemsize, fused, rates.layers) - forward
    transfers = student_transfers(run, machine, stage, layers, taught=taught)
    waited = ("tp", "cp") if parallel.virtual_stages is not None else ("tp", "cp", "pp")
    forward += _seconds(transfers, waited, "forward") / count
    backward += _seconds(transfers, waited, "backward") / count
    shares = [chunk.layers / layers if layers else 1 / len(chunks) for chunk in chunks]
    seconds = [ChunkSeconds(forward * share, backward * share) for share in shares]
    flops = tokens * (layers * 3 + recomputed_layers(parallel, layers)) * layer_flops(model, length)
    if parallel.recompute_granularity == "selective":
        flops += tokens * layers * core_attention_flops(model, length)
    if chunks[0].first:
        moved = embedding_bytes(model, run.rows, run.itemsize) / rates.layers.bytes
        seconds[0] = ChunkSeconds(seconds[0].forward, seconds[0].backward + moved)
    if chunks[-1].last:  # the head computes loss and gradients in one pass
        soft = run.head_teacher if taught else None
        head = head_seconds(head_shape(run, taught), rates.head, None if soft is None else rates.teacher_head)
        seconds[-1] = ChunkSeconds(seconds[-1].forward + head, seconds[-1].backward)
        own = microbatch_tokens(run, taught)
        flops += 3 * own * head_flops(model, run.rows)
        if soft is not None:
            flops += own * head_flops(soft.model, run.rows)
    return StageTime(layers=layers, chunks=tuple(seconds), flops=count * flops, transfers=tuple(transfers))


def _seconds(transfers: Sequence[Transfer], groups: tuple[str, ...], phase: Phase) -> float:
    return sum(one.seconds for one in transfers if one.group in groups and one.phase == phase)


def _exposed(stage: StageTime, parallel: ParallelConfig) -> float:
    """Seconds of gradients and parameters that no pass hides. With overlap, the last backward pass and the first forward pass hide them."""
    groups = ("dp", "embedding")
    gradients, parameters = _seconds(stage.transfers, groups, "gradients"), _seconds(stage.transfers, groups, "parameters")
    if parallel.overlap_grad_reduce:
        gradients = max(0.0, gradients - sum(chunk.backward for chunk in stage.chunks))
    if parallel.overlap_param_gather:
        parameters = max(0.0, parameters - sum(chunk.forward for chunk in stage.chunks))
    return gradients + parameters


def _teacher_seconds(run: PlannedRun, machine: Machine) -> tuple[float, float]:
    """(the teacher's forward passes, the exchange) for the samples that no cache holds. The pipeline of the teacher fills once."""
    teacher = run.teacher
    assert teacher is not None
    layout, plan, length = planned_teacher_layout(run), run.plan, run.config.training.seq_length
    fused = teacher.precision.implementation == "transformer_engine"
    layers = teacher.model.num_layers / (layout.tensor * layout.pipeline)
    microbatch = plan.micro_batch_size * length * layers
    microbatch *= layer_seconds(teacher.model, length, run.itemsize, fused, machine.rates.teacher_layers)
    share = largest_share(plan.num_microbatches, plan.teacher_merge, layout.data // run.layout.data)
    filling = (layout.pipeline - 1) * min(plan.teacher_merge, share)
    transfers = teacher_transfers(run, machine)
    body = microbatch * (share + filling) + sum(one.seconds for one in transfers if one.phase == "teacher")
    computed = 1.0 - run.cached_share
    return body * computed, sum(one.seconds for one in transfers if one.phase == "exchange") * computed


def _update_seconds(run: PlannedRun, machine: Machine) -> float:
    """The optimizer's passes over memory, on the rank with most parameters."""
    config, parallel = run.config, run.config.parallel
    tensors = stage_tensors(
        config.model, parallel, rows=run.rows, seq_length=config.training.seq_length, precision=run.precision
    )
    each = MOMENT_BYTES + (MAIN_BYTES if run.itemsize < 4 else 0)
    moved = [
        sum(one.sizes) * ZEROED_BYTES
        + student_bytes(
            one, parallel, run.layout, itemsize=run.itemsize, precision=run.precision, capability=run.capability
        )["optimizer"] / each * (UPDATE_BYTES - ZEROED_BYTES)
        for one in tensors
    ]  # fmt: skip
    return max(moved) / machine.rates.layers.bytes


def _balance(run: PlannedRun, machine: Machine) -> Prediction:
    """What start-up will tell of stage 1."""
    config, salt, plan, teacher = run.config, run.config.salt, run.plan, run.teacher
    assert teacher is not None
    return predict(
        config.model, config.parallel, teacher.model, teacher_tensor=salt.teacher_tensor_model_parallel_size,
        teacher_pipeline=salt.teacher_pipeline_model_parallel_size, num_microbatches=plan.num_microbatches,
        microbatch_tokens=plan.micro_batch_size * config.training.seq_length, merge=plan.teacher_merge,
        seq_length=config.training.seq_length, head=head_shape(run, taught=True),
        fused_layers=teacher.precision.implementation == "transformer_engine", rates=machine.rates, soft_labels=salt.has_soft_labels,
    )  # fmt: skip

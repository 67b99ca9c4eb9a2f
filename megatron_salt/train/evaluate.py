"""Losses without training: on held-out data, and on the fixed batch by which a checkpoint's weights are recognised later.

No gradient, no dropout, and the same windows every time. The fixed batch is data/reference_batch.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint.run_state import ReferenceLosses, RunState
from megatron_salt.data.batch import Batches, ReadAhead
from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.metrics.run_log import RunLog
from megatron_salt.model.fp8_teacher import in_bfloat16
from megatron_salt.model.loss import KD_METRICS, METRICS
from megatron_salt.parallel.collectives import from_rank_0
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.salt.stage1 import Stage1
from megatron_salt.salt.teacher import Teacher
from megatron_salt.train.exit import ExitPlan
from megatron_salt.train.state import Run
from megatron_salt.train.step import Student, forward_input, forward_step, unwrap


class CutShort(Exception):
    """A reason to leave came before the last batch of an evaluation; its sums are of no use."""

    def __init__(self, num_done: int, num_batches: int, reason: str) -> None:
        super().__init__(f"evaluation cut short after {num_done} of {num_batches} batches: {reason}")
        self.reason = reason


@torch.no_grad()
def evaluate(
    student: Student,
    batches: Batches,
    num_batches: int,
    teacher: Teacher | None = None,
    reason_to_stop: Callable[[], str | None] = lambda: None,
) -> dict[str, float]:
    """Means per token of the head's metrics over `num_batches` global batches; with a teacher, also of the teacher's metrics.

    Collective over all ranks; all receive. The student's figures are the same with a teacher and without. reason_to_stop: called before
    each batch, the same on every rank. Raises CutShort on every rank where it returns a reason.
    """
    mesh, size = student.mesh, student.micro_batch_size
    for chunk in student.chunks:
        chunk.eval()
    reason = None
    sums = torch.zeros(len(METRICS if teacher is None else KD_METRICS), dtype=torch.float64, device=current_device())
    with ReadAhead() as reader:
        for number in range(num_batches):
            if (reason := reason_to_stop()) is not None:
                break
            consumed, after = (one * student.global_batch_size for one in (number, number + 1))
            microbatches = reader.fetch(batches, consumed, after if number + 1 < num_batches else None)
            targets = [None] * len(microbatches) if teacher is None else teacher.annotate(microbatches, kd_weight=0.0)
            inputs = [forward_input(microbatch, mesh, target) for microbatch, target in zip(microbatches, targets, strict=True)]
            for metrics in run_pipeline(
                student.chunks, forward_step, inputs, mesh, student.seq_length, size, forward_only=True
            ):
                sums += metrics
    for chunk in student.chunks:
        chunk.train()
    if reason is not None:
        raise CutShort(number, num_batches, reason)
    return means(sums_over_replicas(sums, mesh))


def sums_over_replicas(sums: Tensor, mesh: Mesh) -> Tensor:
    """Sum metrics over the dp and cp ranks of the last pipeline stage and send them to every stage. Collective over all ranks."""
    dist.all_reduce(sums, group=mesh.groups.dp_cp)
    dist.broadcast(sums, src=dist.get_process_group_ranks(mesh.groups.pp)[-1], group=mesh.groups.pp)
    return sums


def means(sums: Tensor) -> dict[str, float]:
    """{name: mean per token} from metric sums [metrics]; the number of tokens itself is under "tokens"."""
    return {name: float(mean) for name, mean in named_means(sums).items()}


def named_means(sums: Tensor) -> dict[str, Tensor]:
    """`means`, still on the device. The length of the sums says whether they hold the teacher's metrics."""
    names = METRICS if len(sums) == len(METRICS) else KD_METRICS
    tokens = sums[0]
    means = {name: total / tokens.clamp(min=1) for name, total in zip(names[1:], sums[1:], strict=True)}
    return {"tokens": tokens, **means}


def evaluate_run(
    run: Run, valid: Batches, num_batches: int, progress: RunState, log: RunLog, exit_plan: ExitPlan
) -> tuple[RunState, str | None]:
    """Evaluate the student, log it, and in stage 1 decide whether it has passed its teacher. Collective over all ranks.

    The teacher is frozen, so it is evaluated once. Returns the progress, and the reason to leave where one cut the evaluation short:
    such an evaluation is logged, decides nothing, and stays due."""
    started, student, stage1, salt = time.perf_counter(), run.student, run.stage1, progress.salt
    teacher = None if stage1 is None else stage1.teacher
    ask_teacher = teacher is not None and salt is not None and salt.teacher_held_out is None
    try:
        figures = evaluate(student, valid, num_batches, teacher if ask_teacher else None, exit_plan.reason_to_stop_now)
    except CutShort as cut:
        log.event(progress.step, str(cut))
        return progress, cut.reason
    progress = replace(progress, evaluation_due=False)
    if ask_teacher:
        assert salt is not None
        salt = replace(salt, teacher_held_out={"loss": figures["teacher_ce"], "accuracy": figures["teacher_accuracy"]})
        progress = replace(progress, salt=salt)
    beside = {"accuracy": figures["accuracy"]}
    if teacher is not None and salt is not None and salt.teacher_held_out is not None:
        beside |= {f"teacher_{name}": value for name, value in salt.teacher_held_out.items()}
    log.evaluation(progress.step, "valid", figures["loss"], int(figures["tokens"]), time.perf_counter() - started, beside)
    if stage1 is None or teacher is None:
        return progress, None
    return _after_crossover(stage1, progress, figures["accuracy"], log), None


def _after_crossover(stage1: Stage1, progress: RunState, accuracy: float, log: RunLog) -> RunState:
    """Decide whether the student has passed its teacher, and log it. Collective over all ranks; all get rank 0's answer.

    accuracy: the student's, next-token, on held-out data.
    """
    passed = from_rank_0(lambda: accuracy > stage1.accuracy_to_pass(progress))
    if not (passed and stage1.may_cross_over(progress)):
        return progress
    progress = stage1.after_crossover(progress)
    assert progress.salt is not None and progress.salt.teacher_held_out is not None
    teacher, end = progress.salt.teacher_held_out["accuracy"], progress.salt.stage1_end
    log.event(
        progress.step,
        f"the student's held-out accuracy {accuracy:.4f} has passed the teacher's {teacher:.4f} by more than "
        f"--kd-stop-margin {stage1.schedule.kd_stop_margin:g}: stage 1 ends after step {end}",
        {"crossover": progress.step, "stage1_end": end},
    )
    return progress


@torch.no_grad()
def reference_losses(student: Student, vocabulary_size: int) -> ReferenceLosses:
    """The model's losses on the reference batch, for `Checkpointer.save`. Collective over all ranks, the same on all.

    vocabulary_size: ids of the tokenizer. Nothing of the student changes. All its data-parallel replicas compute the same.
    """
    mesh, length = student.mesh, student.seq_length
    lengths = prefix_lengths(length)
    batch = fixed_batch(vocabulary_size, length, lengths, multiple_of=mesh.layout.pipeline if len(student.chunks) > 1 else 1)
    for chunk in student.chunks:
        chunk.eval()
    inputs = [forward_input(microbatch, mesh) for microbatch in batch]
    with ExitStack() as stack:
        for chunk in student.chunks:
            stack.enter_context(in_bfloat16(unwrap(chunk)))
        metrics = run_pipeline(student.chunks, forward_step, inputs, mesh, length, 1, forward_only=True)
    for chunk in student.chunks:
        chunk.train()
    sums = torch.zeros(len(lengths), len(METRICS), dtype=torch.float64, device=current_device())
    if metrics:  # on the last stage
        sums += torch.stack(metrics[: len(lengths)])
    sums = sums_over_replicas(sums, mesh)
    losses = (sums[:, METRICS.index("loss")] / sums[:, METRICS.index("tokens")]).tolist()
    dtype = str(next(student.chunks[0].parameters()).dtype).removeprefix("torch.")
    return ReferenceLosses(tuple(lengths), tuple(loss if math.isfinite(loss) else None for loss in losses), dtype)

"""Losses without training: on held-out data, and on the fixed batch by which a checkpoint's weights are recognised later.

No gradient, no dropout, and the same windows every time. The fixed batch is data/reference_batch.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron_salt.checkpoint.run_state import ReferenceLosses, RunState
from megatron_salt.data.batch import Microbatch, ReadAhead
from megatron_salt.data.blend import VALID
from megatron_salt.data.reference_batch import fixed_batch, prefix_lengths
from megatron_salt.errors import LeftEarly
from megatron_salt.evaluation.evaluate_task import PreparedTask
from megatron_salt.evaluation.in_training import evaluate_tasks
from megatron_salt.metrics.run_log import RunLog
from megatron_salt.model.fp8_teacher import in_bfloat16
from megatron_salt.model.guidance.target import UNTAUGHT
from megatron_salt.model.loss import GATED_METRICS, KD_METRICS, METRICS
from megatron_salt.parallel.collectives import from_rank_0
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.salt.stage1 import Stage1
from megatron_salt.salt.teacher import Teacher
from megatron_salt.train.exit import ExitPlan
from megatron_salt.train.state import Run, ValidationSet
from megatron_salt.train.step import Student, forward_input, forward_step, unwrap


class CutShort(Exception):
    """A reason to leave came before the last batch of an evaluation; its sums are of no use."""

    def __init__(self, num_done: int, reason: str) -> None:
        super().__init__(f"after {num_done} batches: {reason}")
        self.num_done = num_done
        self.reason = reason


class Evaluated(Protocol):
    """What an evaluation needs of a model: a student that is trained, or one that was only loaded."""

    @property
    def chunks(self) -> Sequence[nn.Module]: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...


@torch.no_grad()
def evaluate(
    student: Evaluated,
    held_out: ValidationSet,
    teacher: Teacher | None = None,
    reason_to_stop: Callable[[], str | None] = lambda: None,
    on_batch: Callable[[int], None] = lambda number: None,
) -> dict[str, float]:
    """Means per token of the head's metrics over the batches of a set, and bits per byte; with a teacher, also the teacher's metrics.

    Collective over all ranks; all receive. The student's figures are the same with a teacher and without. reason_to_stop: called before
    each batch, the same on every rank. Raises CutShort on every rank where it returns a reason. on_batch: called after each batch.
    """
    mesh, size, num_batches = student.mesh, student.micro_batch_size, held_out.num_batches
    for chunk in student.chunks:
        chunk.eval()
    reason, num_bytes = None, 0
    sums = torch.zeros(len(METRICS if teacher is None else teacher.metrics), dtype=torch.float64, device=current_device())
    with ReadAhead() as reader:
        for number in range(num_batches):
            if (reason := reason_to_stop()) is not None:
                break
            consumed, after = (one * student.global_batch_size for one in (number, number + 1))
            microbatches = reader.fetch(held_out.batches, consumed, after if number + 1 < num_batches else None)
            num_bytes += sum(label_bytes(microbatch, held_out.byte_counts) for microbatch in microbatches)
            targets = (
                [UNTAUGHT] * len(microbatches)
                if teacher is None
                else teacher.annotate(microbatches, StepWeights(soft_labels=0.0))
            )
            inputs = [forward_input(microbatch, mesh, target) for microbatch, target in zip(microbatches, targets, strict=True)]
            for metrics in run_pipeline(
                student.chunks, forward_step, inputs, mesh, student.seq_length, size, forward_only=True
            ):
                sums += metrics
            on_batch(number)
    for chunk in student.chunks:
        chunk.train()
    if reason is not None:
        raise CutShort(number, reason)
    # Every context-parallel rank has read the whole windows: one of them counts their bytes.
    read = torch.tensor([num_bytes if mesh.at.cp == 0 else 0], dtype=torch.float64, device=current_device())
    *sums_of_metrics, total_bytes = sums_over_replicas(torch.cat([sums, read]), mesh)
    figures = means(torch.stack(sums_of_metrics))
    return figures | {"bits_per_byte": bits_per_byte(figures["loss"], figures["tokens"], float(total_bytes))}


def label_bytes(microbatch: Microbatch, byte_counts: Tensor) -> int:
    """Bytes of text of the labels that count. microbatch: on the CPU."""
    return int(byte_counts[microbatch.labels[microbatch.loss_mask > 0]].sum())


def bits_per_byte(loss: float, num_labels: float, num_bytes: float) -> float:
    """Bits that the model needs for a byte of text. loss: mean over the labels, nats; those that end documents count, with no byte.

    nan where the labels have no byte."""
    return loss * num_labels / math.log(2) / num_bytes if num_bytes else math.nan


def sums_over_replicas(sums: Tensor, mesh: Mesh) -> Tensor:
    """Sum metrics over the dp and cp ranks of the last pipeline stage and send them to every stage. Collective over all ranks."""
    dist.all_reduce(sums, group=mesh.groups.dp_cp)
    dist.broadcast(sums, src=dist.get_process_group_ranks(mesh.groups.pp)[-1], group=mesh.groups.pp)
    return sums


def means(sums: Tensor) -> dict[str, float]:
    """{name: mean per token} from metric sums [metrics]; the number of tokens itself is under "tokens"."""
    return {name: float(mean) for name, mean in named_means(sums).items()}


def named_means(sums: Tensor) -> dict[str, Tensor]:
    """`means`, still on the device. The length of the sums says whether they hold the teacher's metrics and its gate's."""
    names = next(one for one in (METRICS, KD_METRICS, GATED_METRICS) if len(one) == len(sums))
    tokens = sums[0]
    means = {name: total / tokens.clamp(min=1) for name, total in zip(names[1:], sums[1:], strict=True)}
    return {"tokens": tokens, **means}


def evaluate_run(
    run: Run,
    valid: Sequence[ValidationSet],
    tasks: Sequence[PreparedTask],
    progress: RunState,
    log: RunLog,
    exit_plan: ExitPlan,
) -> tuple[RunState, str | None]:
    """Evaluate the student on these of the run's sets and tasks, log it, and in stage 1 decide whether it has passed its teacher.
    Collective over all ranks.

    The teacher is frozen, so it is evaluated once. Returns the progress, and the reason to leave where one cut the evaluation short:
    such an evaluation logs that alone, decides nothing, and stays due."""
    student, stage1, salt = run.student, run.stage1, progress.salt
    teacher = None if stage1 is None else stage1.measured_teacher
    ask_teacher = bool(valid) and teacher is not None and salt is not None and salt.teacher_held_out is None
    figures: dict[str, dict[str, float]] = {}
    for one in valid:
        started = time.perf_counter()
        try:
            found = evaluate(student, one, teacher if ask_teacher else None, exit_plan.reason_to_stop_now)
        except CutShort as cut:
            done = sum(earlier.num_batches for earlier in valid[: len(figures)]) + cut.num_done
            of = sum(each.num_batches for each in valid)
            log.event(progress.step, f"evaluation cut short after {done} of {of} batches: {cut.reason}")
            return progress, cut.reason
        figures[one.name] = found | {"seconds": time.perf_counter() - started}
    try:
        of_tasks = evaluate_tasks(
            tasks, student.chunks, student.mesh, student.micro_batch_size * student.seq_length, exit_plan.reason_to_stop_now
        )
    except LeftEarly as left:
        log.event(progress.step, f"evaluation of {len(tasks)} tasks cut short: {left.reason}")
        return progress, left.reason
    progress = replace(progress, evaluation_due=False, due=())
    if ask_teacher:
        assert salt is not None
        salt = replace(salt, teacher_held_out=teacher_figures(figures))
        progress = replace(progress, salt=salt)
        if stage1 is not None and stage1.cache is not None and salt.teacher_held_out is not None:
            stage1.cache.keep_held_out(salt.teacher_held_out)
    taught = None if teacher is None or salt is None else salt.teacher_held_out
    for name, found in figures.items():
        beside = {key: found[key] for key in ("accuracy", "bits_per_byte")}
        if taught is not None:
            of_set = f"{name}/" if f"{name}/loss" in taught else ""
            beside |= {f"teacher_{key}": taught[of_set + key] for key in ("loss", "accuracy")}
        log.evaluation(progress.step, name, found["loss"], int(found["tokens"]), found["seconds"], beside)
    for task, result in of_tasks.items():
        log.task(progress.step, task, result)
    if stage1 is None or teacher is None or not figures:
        return progress, None
    return _after_crossover(stage1, progress, over_sets(figures, "accuracy"), log), None


def over_sets(figures: Mapping[str, Mapping[str, float]], key: str) -> float:
    """The mean of a figure over the tokens of all sets: {name of a set: {key: mean over its "tokens"}}."""
    if len(figures) == 1:  # as it is, without rounding
        return next(iter(figures.values()))[key]
    tokens = sum(found["tokens"] for found in figures.values())
    return sum(found[key] * found["tokens"] for found in figures.values()) / tokens


def teacher_figures(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The teacher's "loss" and "accuracy" over the tokens of all sets; of each named set under NAME/loss and NAME/accuracy too."""
    of_teacher = {"loss": "teacher_ce", "accuracy": "teacher_accuracy"}
    found = {key: over_sets(figures, metric) for key, metric in of_teacher.items()}
    for name in figures:
        if name != VALID:
            found |= {f"{name}/{key}": figures[name][metric] for key, metric in of_teacher.items()}
    return found


def _after_crossover(stage1: Stage1, progress: RunState, accuracy: float, log: RunLog) -> RunState:
    """Decide whether the student has passed its teacher, and log it. Collective over all ranks; all get rank 0's answer.

    accuracy: the student's, next-token, over the tokens of all sets. An evaluation before the first step decides nothing.
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

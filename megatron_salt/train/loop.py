"""The training loop: fetch, step, tell, and at times evaluate, save or leave.

The loop knows no parallelism. What it needs to continue is in `Progress`, which every checkpoint holds.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megatron_salt.config import CheckpointConfig, TrainingConfig
from megatron_salt.data.batch import Batches
from megatron_salt.train.build import Run
from megatron_salt.train.evaluate import evaluate
from megatron_salt.train.metrics import PhaseTimer, RunLog, StepRecord
from megatron_salt.train.nonfinite import NonFiniteWatch
from megatron_salt.train.operations import GarbageSchedule, Profiler
from megatron_salt.checkpoint.resume import Progress
from megatron_salt.train.signals import ExitPlan
from megatron_salt.train.step import StepOutcome, train_step


def train(
    run: Run, training: TrainingConfig, checkpoint: CheckpointConfig, log: RunLog, exit_plan: ExitPlan, profiler: Profiler
) -> Progress:
    """Train from run.progress to the end, or until there is a reason to leave. Collective over all ranks. Returns where it stopped."""
    progress, total = run.progress, run.plan.total_steps
    timer, garbage = PhaseTimer(), GarbageSchedule(training)
    nonfinite = NonFiniteWatch(training.max_nonfinite_steps, progress.extra.get("nonfinite_in_a_row", 0))
    _announce(run, log)
    garbage.start()
    reason = None
    while progress.step < total and reason is None:
        step = progress.step + 1
        profiler.before_step(step)
        started, learning_rate = time.perf_counter(), run.student.learning_rate
        with timer.phase("data"):
            position = progress.data.get("position", 0)
            microbatches = run.train.fetch(position)
        outcome = train_step(run.student, microbatches, timer)
        nonfinite.note(step, outcome, microbatches, run.student.mesh)
        progress = replace(
            progress,
            step=step,
            consumed_samples=progress.consumed_samples + run.plan.global_batch_size,
            data={"position": position + run.plan.global_batch_size},
            extra={**progress.extra, "nonfinite_in_a_row": nonfinite.in_a_row},
        )
        seconds = time.perf_counter() - started
        log.step(_record(run, progress, outcome, learning_rate, seconds, timer))
        garbage.after_step(step)
        if run.valid is not None and training.eval_iters and (step % training.eval_interval == 0 or step == total):
            with timer.phase("eval"):
                _evaluate(run, run.valid, training.eval_iters, step, log)
        reason = exit_plan.reason_to_leave(step)
        with timer.phase("save"):
            run.checkpointer.poll()
            due = checkpoint.save_interval is not None and step % checkpoint.save_interval == 0
            if checkpoint.save is not None and (due or reason is not None or step == total):
                log.flush()
                run.checkpointer.save(progress, final=step == total)
    profiler.stop(progress.step + 1)
    garbage.stop()
    run.checkpointer.finish()
    if reason is not None:
        log.event(progress.step, f"leaving: {reason}")
    return progress


def _announce(run: Run, log: RunLog) -> None:
    """Say what the reader of the log should know about the steps to come."""
    step, total = run.progress.step, run.plan.total_steps
    if step >= total:
        log.event(step, f"nothing to train: {step} steps are done, and the run has {total}")
    elif told := run.train.samples.repeats(run.progress.data.get("position", 0) + (total - step) * run.plan.global_batch_size):
        log.event(step, told)


def _record(
    run: Run, progress: Progress, outcome: StepOutcome, learning_rate: float, seconds: float, timer: PhaseTimer
) -> StepRecord:
    loss: Tensor | float = float("nan")
    if outcome.sums is not None:
        sums = outcome.sums.sum(0)
        dist.all_reduce(sums, group=run.student.mesh.groups.dp_cp)
        loss = sums[1] / sums[0].clamp(min=1)
    return StepRecord(
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        loss=loss,
        lr=learning_rate,
        grad_norm=outcome.grad_norm,
        tokens=run.plan.global_batch_size * run.student.seq_length,
        seconds=seconds,
        nonfinite=not outcome.applied,
        phases=timer.take(),
    )


def _evaluate(run: Run, valid: Batches, num_batches: int, step: int, log: RunLog) -> None:
    started, student = time.perf_counter(), run.student
    figures = evaluate(
        student.chunks, valid, num_batches, student.mesh, student.seq_length, student.micro_batch_size, student.global_batch_size
    )
    log.evaluation(step, "valid", figures["loss"], int(figures["tokens"]), time.perf_counter() - started)

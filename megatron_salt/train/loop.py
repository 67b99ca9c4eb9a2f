"""The training loop: fetch, step, log, and at times evaluate, save or leave.

The loop knows no parallelism. All that it needs to continue is in `RunState`, which every checkpoint holds.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megatron_salt.checkpoint.run_state import PartDue, RunState
from megatron_salt.config import CheckpointConfig, TrainingConfig
from megatron_salt.data.batch import ReadAhead
from megatron_salt.evaluation.evaluate_task import PreparedTask
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.metrics.profiling import GarbageSchedule, Profiler
from megatron_salt.metrics.run_log import RunLog, StepRecord
from megatron_salt.metrics.stragglers import Heartbeat, StragglerReport
from megatron_salt.salt.guidance.distance import mean_distance
from megatron_salt.salt.schedule import PLAIN, StepWeights
from megatron_salt.salt.teacher_cache.cache import StepUse
from megatron_salt.train.evaluate import evaluate_run, named_means, reference_losses
from megatron_salt.train.exit import ExitPlan
from megatron_salt.train.nonfinite import NonFiniteWatch, WayOut, find_way_out, refuse_nonfinite, refuse_nonfinite_losses
from megatron_salt.train.state import Run, ValidationSet, announce, enter_stage2, finish_cache
from megatron_salt.train.step import StepOutcome, train_step

SHOWN = ("ce", "kl", "teacher_ce", "agreement", "taught")
"""Metrics that stage 1 adds to a log line where it has them, beside the teacher's weight: see model/loss.py."""


def train(
    run: Run, start: RunState, training: TrainingConfig, checkpoint: CheckpointConfig, log: RunLog, reader: ReadAhead,
    exit_plan: ExitPlan, profiler: Profiler, heartbeat: Heartbeat, stragglers: StragglerReport,
) -> RunState:  # fmt: skip
    """Train from `start` to the end, or until there is a reason to leave. Collective over all ranks. Returns where it stopped."""
    progress, total = start, run.plan.total_steps
    timer, garbage = PhaseTimer(), GarbageSchedule(training)
    nonfinite = NonFiniteWatch(training.max_nonfinite_steps, progress.nonfinite_in_a_row)
    announce(run, progress, log)
    garbage.start()
    reason = None
    due = _due_at_start(run, training, progress)
    if any(due):
        with timer.phase("eval"):
            progress, reason = evaluate_run(run, *due, progress, log, exit_plan)
        if reason is None:
            run.checkpointer.add_evaluation(progress)
    while progress.step < total and reason is None:
        step = progress.step + 1
        if run.stage1 is not None and not run.stage1.contains(step, progress):
            run, progress = enter_stage2(run, run.stage1, progress, log)
        stage1 = run.stage1
        profiler.before_step(step)
        started, learning_rate = time.perf_counter(), run.student.learning_rate
        with timer.phase("data"):
            after = progress.position + run.plan.global_batch_size
            same_data_follows = step < total and (stage1 is None or stage1.contains(step + 1, progress))
            microbatches = reader.fetch(run.train, progress.position, after if same_data_follows else None)
        weights = PLAIN if stage1 is None else stage1.weights(step, progress)
        cache = None if stage1 is None else stage1.cache
        use = None if cache is None else cache.use_of_step(run.train, progress.position, run.plan.global_batch_size)
        teacher_flops = teacher_flops_of_step(run, weights, use)
        outcome = train_step(
            run.student, microbatches, timer, None if stage1 is None else stage1.teacher, weights,
            None if cache is None else cache.keep,
        )  # fmt: skip
        nonfinite.note(step, outcome, microbatches, run.student.mesh, _way_out(run, checkpoint, after))
        if step == total:
            nonfinite.note_last(outcome)
        progress = replace(
            progress,
            step=step,
            consumed_samples=progress.consumed_samples + run.plan.global_batch_size,
            teacher_flops=None if progress.teacher_flops is None else progress.teacher_flops + teacher_flops,
            position=after,
            nonfinite_in_a_row=nonfinite.in_a_row,
        )
        seconds = time.perf_counter() - started
        record = _record(run, progress, outcome, learning_rate, weights, teacher_flops, use, seconds, timer)
        log.step(record)
        garbage.after_step(step)
        heartbeat.beat(step)
        if (report := stragglers.after_step(step, reader.seconds)) is not None:
            log.event(step, *report)
        reason = exit_plan.reason_to_leave(step)
        due = _evaluations_due(run, training, step)
        progress = replace(progress, evaluation_due=any(due), due=_parts(due))
        with timer.phase("save"):
            run.checkpointer.poll()
        # Save before evaluating: should anything end the evaluation, a resumed run begins with it.
        saved = _save_if_due(run, checkpoint, progress, timer, log, leaving=reason is not None, final=step == total)
        if any(due):
            with timer.phase("eval"):
                progress, cut = evaluate_run(run, *due, progress, log, exit_plan)
            reason = reason or cut
            if cut is None:
                run.checkpointer.add_evaluation(progress)
            elif not saved:
                _save_if_due(run, checkpoint, progress, timer, log, leaving=True)
    finish_cache(run, progress, log)
    profiler.stop(progress.step + 1)
    garbage.stop()
    run.checkpointer.finish()
    exit_plan.finish()
    if progress.step >= total:
        stands = _way_out(run, checkpoint, progress.position)
        if progress.step == start.step:  # nothing was trained, so nothing was checked
            refuse_nonfinite(run.student, progress.step, stands)
        nonfinite.refuse_end(progress.step, stands)
    if reason is not None:
        log.event(progress.step, f"leaving: {reason}")
    return progress


Evaluations = tuple[tuple[ValidationSet, ...], tuple[PreparedTask, ...]]
"""Held-out sets and tasks to evaluate."""


def _due_at_start(run: Run, training: TrainingConfig, start: RunState) -> Evaluations:
    """What a start evaluates before its first step: what was due when the checkpoint was saved, under the flags of then or of now. Pure."""
    if not start.evaluation_due:
        return (), ()
    sets, tasks = _evaluations_due(run, training, start.step)
    return run.valid if "held_out" in start.due else sets, run.tasks if "tasks" in start.due else tasks


def _parts(due: Evaluations) -> tuple[PartDue, ...]:
    sets, tasks = due
    return (*(("held_out",) if sets else ()), *(("tasks",) if tasks else ()))


def _evaluations_due(run: Run, training: TrainingConfig, step: int) -> Evaluations:
    """The held-out sets and the tasks that are evaluated after `step`, the last step and step 0 included. Pure."""

    def is_due(interval: int) -> bool:
        return step % interval == 0 or step == run.plan.total_steps

    sets = run.valid if is_due(training.eval_interval) else ()
    return sets, run.tasks if is_due(training.eval_tasks_interval or training.eval_interval) else ()


def _save_if_due(
    run: Run, checkpoint: CheckpointConfig, progress: RunState, timer: PhaseTimer, log: RunLog, leaving: bool = False,
    final: bool = False,
) -> bool:  # fmt: skip
    """Save at --save-interval, at a step of --save-at, and where the run leaves or ends. Returns whether it saved. Collective.

    Raises NonFiniteError where the model is not finite; where the run leaves or ends, also without --save.
    """
    step = progress.step
    due = checkpoint.save_interval is not None and step % checkpoint.save_interval == 0
    name = "save-at" if step in checkpoint.save_at else None
    if not (due or name is not None or leaving or final):
        return False
    stands = _way_out(run, checkpoint, progress.position)
    with timer.phase("save"):
        refuse_nonfinite(run.student, step, stands)
        if checkpoint.save is None:
            return False
        log.flush()
        recorded = reference_losses(run.student, run.train.samples.vocabulary_size)
        refuse_nonfinite_losses(recorded, step, stands)
        run.checkpointer.save(progress, recorded, name, final=final)
    return True


def teacher_flops_of_step(run: Run, weights: StepWeights, use: StepUse | None) -> float:
    """FLOPs of the teacher in a step with these weights, over all ranks. use: of the teacher's cache; None without one. Pure."""
    tokens = run.plan.global_batch_size * run.student.seq_length
    return 0.0 if run.stage1 is None else run.stage1.flops_of_step(tokens, weights, use)


def _way_out(run: Run, checkpoint: CheckpointConfig, position: int) -> WayOut:
    return find_way_out(run.checkpointer, checkpoint, position, run.plan.global_batch_size)


def _record(
    run: Run, progress: RunState, outcome: StepOutcome, learning_rate: float, weights: StepWeights, teacher_flops: float,
    use: StepUse | None, seconds: float, timer: PhaseTimer,
) -> StepRecord:  # fmt: skip
    """The log's record of a step. Collective over the dp and cp ranks of the last pipeline stage, with hidden-state guidance over all."""
    figures: dict[str, Tensor] = {}
    guidance: dict[str, Tensor | float] = {}
    if weights.hidden is not None:
        guidance = {"let_weight": weights.hidden, "let_loss": mean_distance(outcome.guide_sums, run.student.mesh)}
    if outcome.sums is not None:
        sums = outcome.sums.sum(0)
        dist.all_reduce(sums, group=run.student.mesh.groups.dp_cp)
        figures = named_means(sums)
    return StepRecord(
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        loss=figures.get("loss", float("nan")),
        lr=learning_rate,
        grad_norm=outcome.grad_norm,
        tokens=run.plan.global_batch_size * run.student.seq_length,
        seconds=seconds,
        step_teacher_flops=teacher_flops,
        teacher_flops=progress.teacher_flops,
        nonfinite=not outcome.applied,
        phases=timer.take(),
        extra={}
        if run.stage1 is None
        else ({} if weights.soft_labels is None else {"kd_weight": weights.soft_labels})
        | ({} if weights.temperature is None else {"kd_temperature": weights.temperature})
        | guidance
        | {name: figures[name] for name in SHOWN if name in figures}
        | ({} if use is None else {"teacher_cached": use.cached}),
    )

"""The parts of a run, how they change from stage 1 to stage 2, and what the log says of them.

`Run` stands still within a stage. `RunState` (checkpoint/run_state.py) moves with every step and is what a checkpoint holds. Both are
values: the loop replaces them, and nobody changes one in place.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from megatron_salt.checkpoint.changes import CHANGED, tell
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.run_state import RunState
from megatron_salt.config import TrainingConfig
from megatron_salt.data.batch import Batches
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.evaluation.evaluate_task import PreparedTask
from megatron_salt.metrics.memory import forget_peak_memory, memory_in_use_gib
from megatron_salt.metrics.run_log import RunLog
from megatron_salt.parallel.collectives import from_rank_0, largest
from megatron_salt.parallel.layout import Layout
from megatron_salt.salt.cost import scoring_flops, scoring_line
from megatron_salt.salt.stage1 import Stage1, data_of_stage2
from megatron_salt.salt.stage_samples import StageSamples
from megatron_salt.salt.teacher import Teacher
from megatron_salt.salt.teacher_cache.cache import cache_line
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, model_that_scored
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.step import Student


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Held-out data that is evaluated and logged under a name of its own."""

    name: str
    """ "valid", or "valid/NAME" for a named set."""

    batches: Batches
    num_batches: int
    """Global batches in one evaluation."""

    byte_counts: Tensor
    """int64 [vocabulary_size], on the CPU: bytes of text that each id stands for."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop needs and does not move: the parts of the run in its present stage."""

    student: Student
    plan: RunPlan
    """Counts of the whole run, steps that are done included; batch sizes of the present stage."""

    train: Batches
    valid: tuple[ValidationSet, ...]
    """What an evaluation reads; empty where the run makes none."""

    tasks: tuple[PreparedTask, ...] = ()
    """Likelihood tasks that are evaluated in training."""

    checkpointer: Checkpointer
    stage1: Stage1 | None
    """None in stage 2, and in a run without a stage 1."""

    stage_samples: StageSamples | None
    """The samples of both stages; None: the whole run draws from one order."""


def in_stage2(run: Run, progress: RunState) -> tuple[Run, RunState]:
    """The run in stage 2: no teacher, --stage2-micro-batch-size and --stage2-data. Pure."""
    plan = run.plan.in_stage2()
    train, progress = data_of_stage2(run.train.in_microbatches_of(plan.micro_batch_size), run.stage_samples, progress)
    run = replace(
        run,
        stage1=None,
        plan=plan,
        student=replace(run.student, micro_batch_size=plan.micro_batch_size),
        train=train,
        valid=tuple(replace(one, batches=one.batches.in_microbatches_of(plan.micro_batch_size)) for one in run.valid),
    )
    return run, progress


def enter_stage2(run: Run, stage1: Stage1, progress: RunState, log: RunLog) -> tuple[Run, RunState]:
    """Free the teacher, and go on with the data of stage 2. Collective over all ranks."""
    finish_cache(run, progress, log)
    if stage1.teacher is not None:
        free_teacher(stage1.teacher, progress, run.plan.stage2_micro_batch_size, log)
    in_stage1 = run.train
    run, progress = in_stage2(run, progress)
    stage_samples = run.stage_samples
    if stage_samples is None:
        return run, progress
    passed = in_stage1.position(run.train.since)
    to_come = (run.plan.total_steps - progress.step) * run.plan.global_batch_size
    repeats = from_rank_0(lambda: stage_samples.repeats(passed, to_come))
    log.event(
        progress.step,
        f"stage 2 draws {to_come} samples from {run.train.samples.num_members} (--stage2-data {stage_samples.stage2_data}); stage 1 drew "
        f"{passed} from the {in_stage1.samples.num_members} of the selection{'' if repeats is None else f'; {repeats}'}",
        {"stage2_since": run.train.since} | ({"stage": 2} if stage1.teacher is None else {}),
    )
    announce(run, progress, log)
    return run, progress


def finish_cache(run: Run, progress: RunState, log: RunLog) -> None:
    """At the end of stage 1, or of the run in it: write what the teacher's cache still lacks, and log its use. Collective over all
    ranks."""
    if run.stage1 is None or run.stage1.cache is None:
        return
    totals = run.stage1.cache.finish()
    if totals.steps:
        log.event(progress.step, cache_line(totals, run.plan.global_batch_size), {"teacher_cache": asdict(totals)})


def free_teacher(teacher: Teacher, progress: RunState, micro_batch_size: int, log: RunLog) -> None:
    """Free the teacher, and log the memory that this gave back. micro_batch_size: of stage 2. Collective over all ranks."""
    started, before = time.perf_counter(), memory_in_use_gib()
    teacher_gib = teacher.num_bytes / 2**30
    teacher.free()
    after = memory_in_use_gib()
    forget_peak_memory()  # so that the log shows stage 2's own
    most = largest(round((before - after) * 2**20)) / 2**20
    log.event(
        progress.step,
        f"stage 2: the teacher ({teacher_gib:.3f} GiB here) is gone in {time.perf_counter() - started:.2f} s; memory in use "
        f"{before:.3f} GiB before, {after:.3f} GiB after ({most:.3f} GiB less on the rank that gained most)",
        {"stage": 2, "memory_gib_before": before, "memory_gib_after": after, "micro_batch_size": micro_batch_size},
    )


def announce(run: Run, progress: RunState, log: RunLog) -> None:
    """Log what a reader should know about the steps to come, as far as they draw from one order."""
    step, total = progress.step, run.plan.total_steps
    if step >= total:
        log.event(step, f"nothing to train: {step} steps are done, and the run has {total}")
        return
    if run.stage1 is not None and (fidelity := run.stage1.fidelity) is not None:
        log.event(step, str(fidelity), {"teacher_fp8": asdict(fidelity)})
    if run.stage1 is not None and (dropped := run.stage1.dropped) is not None:
        log.event(step, str(dropped), {"teacher_vocabulary": asdict(dropped)})
    if run.stage1 is not None and (bos_losses := run.stage1.bos_losses) is not None:
        log.event(step, str(bos_losses), {"teacher_bos": asdict(bos_losses)})
    if run.stage_samples is not None and run.stage1 is not None and progress.salt is not None:
        total = min(total, progress.salt.stage1_end)
    drawn = progress.position + (total - step) * run.plan.global_batch_size
    if message := run.train.samples.repeats(run.train.position(drawn)):
        log.event(step, message)


def log_start(training: TrainingConfig, plan: RunPlan, layout: Layout, start: RunState, parameters: int, log: RunLog) -> None:
    """Log the size of the run, and every flag that changes what it goes on with."""
    log.event(
        start.step,
        f"{parameters / 1e6:.2f}M parameters on {layout.world_size} ranks: tp {layout.tensor}, pp {layout.pipeline}, "
        f"cp {layout.context}, dp {layout.data}; "
        f"{plan.num_microbatches} microbatches of {plan.micro_batch_size} a replica and step",
        {"parameters": parameters, "layout": layout.sizes},
    )
    for event in start.events:
        if event["event"] == CHANGED and event["step"] == start.step:
            log.event(start.step, tell(event), {name: event[name] for name in ("flag", "from", "to")})
    if start.teacher_flops is None and start.salt is not None:
        log.event(
            start.step,
            f"teacher_flops are not told: an earlier release did not count them up to this step, and the teacher {start.salt.teacher} is "
            f"not in {start.salt.teacher_directory}",
            {"teacher_flops": None},
        )
    if ranges := parse_skip_samples(training.skip_samples):
        left_out = sum(end - first for first, end in ranges)
        log.event(
            start.step,
            f"--skip-samples {' '.join(training.skip_samples)} leaves {left_out} samples of the order out",
            {"skip_samples": ranges},
        )


def log_cost_of_scores(
    run: Run, stage1: Stage1, teacher: TeacherCheckpoint | None, start: RunState, flops: float, log: RunLog
) -> None:
    """Log what share of the run's FLOPs the scoring took, where the teacher that scored is known. flops: of the student, for a token."""
    assert run.stage_samples is not None
    scores = run.stage_samples.selection.manifest.scores
    scored_by = model_that_scored(scores, teacher)
    if scored_by is None:
        return
    length, plan = scores.seq_length, run.plan
    taught = stage1.flops_of_run(plan.total_steps, length * plan.global_batch_size)
    training = length * plan.total_samples * flops + taught
    scoring = scoring_flops(scores, scored_by)
    log.event(start.step, scoring_line(scoring, training), {"scoring_flops": scoring, "training_flops": training})

"""Build a run from its config: student, checkpoint, data, and the teacher where the run is in stage 1. Cheap checks come first."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from megatron_salt.checkpoint import retention, save_directory
from megatron_salt.checkpoint.async_writer import describe
from megatron_salt.checkpoint.checkpointer import Checkpointer
from megatron_salt.checkpoint.compatibility import RunIdentity
from megatron_salt.checkpoint.owner import Ownership, acquire, myself, refuse_living
from megatron_salt.checkpoint.run_state import OpenedCheckpoint, RunState
from megatron_salt.config import CheckpointConfig, RunConfig
from megatron_salt.data.batch import Batches, first_microbatches
from megatron_salt.data.blend import VALID
from megatron_salt.data.samples import Samples
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import LeftEarly, Look, UserError, stay
from megatron_salt.model.flops import body_flops, forward_flops_per_token, head_flops
from megatron_salt.model.precision import Precision
from megatron_salt.parallel.collectives import from_rank_0
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from megatron_salt.salt.fp8_check import SAMPLES
from megatron_salt.salt.guidance.layer_place import stages_of_run
from megatron_salt.salt.guidance.what_is_taught import lesson_lines
from megatron_salt.salt.output_weight import WINDOWS
from megatron_salt.salt.shared_vocabulary import describe_vocabularies, missing_bos
from megatron_salt.salt.stage1 import Stage1, decide_salt, schedule_of, starts_in_stage2
from megatron_salt.salt.teacher_cache.cache import TeacherCache, open_cache
from megatron_salt.salt.teacher_cache.of_run import held_out_facts, manifest_of, rounding_of, why_layers_are_needed
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, model_of_teacher
from megatron_salt.tokenizer.id_bytes import bytes_of_ids
from megatron_salt.tokenizer.tokenizer import Tokenizer
from megatron_salt.train.build_model import build_student, dtype_of
from megatron_salt.train.build_teacher import build_teacher
from megatron_salt.train.exit import SignalWatch
from megatron_salt.train.inputs import Inputs
from megatron_salt.train.plan import RunPlan
from megatron_salt.train.start import PLAIN, Precisions, rest_of_run
from megatron_salt.train.state import Run, ValidationSet, in_stage2

log = logging.getLogger(__name__)


def build(
    config: RunConfig, plan: RunPlan, layout: Layout, inputs: Inputs, identity: RunIdentity, *, timeout: timedelta,
    precisions: Precisions = PLAIN, held: contextlib.ExitStack | None = None, opened: OpenedCheckpoint | None = None,
    watch: SignalWatch | None = None, look: Look = stay,
) -> tuple[Run, RunState]:  # fmt: skip
    """Make mesh, student and optimizer, load the checkpoint that --load means, and make the teacher of stage 1.

    Returns the run and the state that it starts from. Collective over all ranks. Raises UserError.

    identity: see `start.identify`. held: releases --save when the run ends; None: nobody else writes there. opened: the checkpoint, where
    it is open already. watch: a signal ends the wait for another run's --save. look: called between the phases and inside the longest;
    raises LeftEarly.
    """
    mesh = make_student_mesh(layout, config.parallel.virtual_stages, timeout)
    seed_everything(config.training.seed, mesh)
    student = build_student(config, plan, inputs.tokenizer.vocabulary_size, mesh, precisions.student)
    look("building the model")
    checkpointer = Checkpointer(
        config.checkpoint, identity, inputs.tokenizer, mesh, chunks=student.chunks, optimizer=student.optimizer,
        scheduler=student.scheduler, owner=None if held is None else own_save(config.checkpoint, held, watch),
    )  # fmt: skip
    loaded = checkpointer.load(opened, look)
    progress = loaded or RunState()
    step = progress.step

    def look_before_step(doing: str) -> None:
        try:
            look(doing)
        except LeftEarly as left:
            raise LeftEarly(left.reason, step) from None

    look_before_step("loading the checkpoint" if loaded else "making --save")
    plan = rest_of_run(config, plan, progress)

    def batches(samples: Samples, skip: tuple[str, ...]) -> Batches:
        return Batches(
            samples,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            replica=mesh.at.dp,
            num_replicas=layout.data,
            skip=parse_skip_samples(skip),
        )

    counts = byte_counts(inputs.tokenizer)
    run = Run(
        student=student,
        plan=plan,
        train=batches(
            inputs.train if inputs.stage_samples is None else inputs.stage_samples.stage1(), config.training.skip_samples
        ),
        valid=tuple(
            ValidationSet(
                name=name,
                batches=batches(samples, ()),
                num_batches=evaluated_batches(name, len(samples), config.training.eval_iters, plan.global_batch_size),
                byte_counts=counts,
            )
            for name, samples in (inputs.valid if config.training.eval_iters else {}).items()
        ),
        tasks=inputs.tasks,
        checkpointer=checkpointer,
        stage1=None,
        stage_samples=inputs.stage_samples,
    )
    if progress.step == 0 and config.training.eval_at_start and (run.valid or run.tasks):
        progress = replace(progress, evaluation_due=True)
    resumed = progress if loaded is not None and progress.step > 0 else None
    salt, events = decide_salt(config.salt, resumed, inputs.teacher)
    progress = replace(progress, salt=salt, events=(*progress.events, *events))
    if progress.teacher_flops is None:
        uncounted = progress
        progress = replace(progress, teacher_flops=from_rank_0(lambda: uncounted_teacher_flops(uncounted, config, inputs)))
    return in_its_stage(run, progress, config, inputs, timeout=timeout, precision=precisions.teacher, look=look_before_step)


def in_its_stage(
    run: Run, progress: RunState, config: RunConfig, inputs: Inputs, *, timeout: timedelta, precision: Precision, look: Look
) -> tuple[Run, RunState]:
    """The run in the stage in which it starts; in stage 1 with its teacher, where it has one. precision: the teacher's.

    Collective over all ranks. Raises UserError."""
    state, teacher, schedule = progress.salt, inputs.teacher, schedule_of(config.salt)
    if state is None:
        return run, progress
    if starts_in_stage2(state, progress, schedule, teacher, evaluates=bool(run.valid)):
        return in_stage2(run, progress)
    assert schedule is not None
    if teacher is None:
        return replace(run, stage1=Stage1(None, schedule)), progress
    # The teacher is evaluated anew: the held-out data, or how much of it is used, may have changed.
    progress = replace(progress, salt=replace(state, teacher_held_out=None))
    for line in lesson_lines(config, run.plan.total_steps):
        log.info("%s", line)
    vocabulary_size, soft_labels = inputs.tokenizer.vocabulary_size, config.salt.has_soft_labels
    if log.isEnabledFor(logging.INFO):  # on one rank: it encodes text
        for line in describe_vocabularies(teacher, inputs.tokenizer, inputs.shared_ids if soft_labels else None, inputs.train):
            log.info("%s", line)
    unseen = tuple(inputs.valid.values()) or (run.train.samples,)  # also with --eval-iters 0
    windows = [window for samples in unseen for window in first_microbatches(samples, -(-WINDOWS // len(unseen)))]
    bos = missing_bos(teacher, inputs.tokenizer, (inputs.train, *inputs.valid.values()), windows) if soft_labels else None
    cache = open_teacher_cache(run, config, inputs, teacher, precision)
    why: str | None = "there is no cache"
    if cache is not None:
        run = replace(run, train=run.train.with_cached(cache.add_cached))
        progress = replace(progress, salt=replace(state, teacher_held_out=cache.held_out))
        left = (min(state.stage1_end, run.plan.total_steps) - progress.step) * run.plan.global_batch_size
        holds_all = cache.holds(run.train, progress.position, progress.position + left)
        evaluates = bool(run.valid) and cache.held_out is None and soft_labels
        own_ids = soft_labels and teacher.vocabulary_size > inputs.shared_ids
        why = why_layers_are_needed(holds_all, precision, own_ids, bos, evaluates)
        log.info("teacher cache: the teacher's layers are %s", "not loaded" if why is None else f"loaded: {why}")
    admitted = build_teacher(
        config, run.plan, teacher, run.student, vocabulary_size, timeout=timeout, shared_ids=inputs.shared_ids, precision=precision,
        text=run.train.first(SAMPLES), windows=windows, bos=bos, with_body=why is not None, look=look,
    )  # fmt: skip
    stage1 = Stage1(
        admitted.teacher, schedule, teacher_body_flops=body_flops(teacher.model, config.training.seq_length),
        teacher_head_flops=head_flops(teacher.model, config.model.padded_vocabulary_size(vocabulary_size)),
        fidelity=admitted.fidelity, dropped=admitted.dropped, bos_losses=admitted.bos_losses, cache=cache,
    )  # fmt: skip
    return replace(run, stage1=stage1), progress


def open_teacher_cache(
    run: Run, config: RunConfig, inputs: Inputs, teacher: TeacherCheckpoint, precision: Precision
) -> TeacherCache | None:
    """The cache of --teacher-cache; None without the flag. precision: the teacher's. Collective over all ranks. Raises UserError."""
    if config.salt.teacher_cache is None:
        return None
    salt, samples = config.salt, run.plan.micro_batch_size * run.plan.teacher_merge
    sets = {
        one.name: (one.batches.samples, one.num_batches * run.plan.global_batch_size)
        for one in run.valid
        if salt.has_soft_labels
    }
    rounding = rounding_of(salt, samples, precision)
    return open_cache(
        Path(config.salt.teacher_cache),
        lambda: manifest_of(salt, teacher, inputs.train, dtype_of(config.training), rounding, precision.fp8_recipe),
        run.student.mesh, stages=stages_of_run(config), forward_samples=samples,
        held_out=lambda: held_out_facts(sets, inputs.shared_ids), sets=tuple(sets),
    )  # fmt: skip


def uncounted_teacher_flops(progress: RunState, config: RunConfig, inputs: Inputs) -> float | None:
    """FLOPs of the teacher in all steps that are done, where an earlier release did not count them; None without the teacher's
    checkpoint. Exact as long as all steps had one global batch size. Not collective."""
    state = progress.salt
    if state is None or state.teacher is None or state.teacher_directory is None:
        return None
    model = model_of_teacher(state.teacher, state.teacher_directory, inputs.teacher)
    if model is None:
        return None
    length, rows = config.training.seq_length, config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
    samples = progress.consumed_samples * min(progress.step, state.stage1_end) / progress.step
    return samples * length * forward_flops_per_token(model, length, rows)


def byte_counts(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text that each id stands for: int64 [vocabulary_size], on the CPU."""
    return torch.tensor([len(content) for content in bytes_of_ids(tokenizer)])


def evaluated_batches(name: str, num_samples: int, eval_iters: int, global_batch_size: int) -> int:
    """Global batches in one evaluation: --eval-iters, but of a named set at most as many as it has, so that no sample counts twice."""
    return eval_iters if name == VALID else min(eval_iters, num_samples // global_batch_size)


def own_save(checkpoint: CheckpointConfig, held: contextlib.ExitStack, watch: SignalWatch | None) -> Ownership | None:
    """Make this run the owner of --save until `held` ends. Returns the ownership on rank 0, None elsewhere. Collective over all ranks.

    All raise UserError where another run owns --save, or where it holds checkpoints that this run does not come from.
    """
    if checkpoint.save is None:
        return None
    save, own = Path(checkpoint.save), []

    def take() -> None:
        if not checkpoint.take_over_save:
            refuse_living(save)
        retention.refuse_foreign(checkpoint)
        leaving = (lambda: False) if watch is None else (lambda: watch.received != 0)
        own.append(acquire(save, myself(os.environ), checkpoint.take_over_save, leaving=leaving))

    try:
        from_rank_0(take)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        names = [path.name for path in save_directory.unfinished(save)] if full else []
        way = f"; what is left of unfinished saves may be deleted by hand: {', '.join(names)}" if names else ""
        raise UserError(f"--save {save} cannot be written: rank 0: {describe(error)}{way}") from None
    for ownership in own:
        held.callback(ownership.release)
    return own[0] if own else None

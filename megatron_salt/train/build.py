"""From flags to a run that is ready for its first step, in the order in which things can go wrong cheapest first."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_salt.checkpoint import integrity, retention, save_directory
from megatron_salt.checkpoint.async_writer import describe
from megatron_salt.checkpoint.checkpointer import TOKENIZER, Checkpointer
from megatron_salt.checkpoint.compatibility import Found, RunIdentity, read_facts, schedule_follows_run
from megatron_salt.checkpoint.owner import Ownership, acquire, myself, refuse_living
from megatron_salt.checkpoint.run_state import EVALUATION_DUE, Progress, SaltProgress
from megatron_salt.config import CheckpointConfig, RunConfig, SaltConfig, TrainingConfig
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.data.batch import Batches, passed_positions
from megatron_salt.data.run_tokenizer import tokenizer_of_run
from megatron_salt.data.samples import Samples, open_training_data
from megatron_salt.data.skip_samples import parse_skip_samples
from megatron_salt.errors import LeftEarly, Look, UserError, stay
from megatron_salt.model.flops import forward_flops_per_token
from megatron_salt.model.gpt import build_model
from megatron_salt.model.loss import chunk_tokens_for_budget, weight_gradient_bytes
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.model.vocab_parallel import VocabularyShard
from megatron_salt.parallel.collectives import from_rank_0
from megatron_salt.parallel.launch import seed_everything
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import Mesh, make_student_mesh, new_group_of
from megatron_salt.salt.cost import predict
from megatron_salt.salt.fp8_check import SAMPLES
from megatron_salt.salt.head_cost import measure_head
from megatron_salt.salt.load_teacher import TeacherCheckpoint, admit, read_teacher, refuse_trainable, refuse_unfit
from megatron_salt.salt.resumption import Events, salt_from
from megatron_salt.salt.routing import exchange_gib, teacher_layout, warnings
from megatron_salt.salt.schedule import Schedule
from megatron_salt.salt.stage1 import Stage1
from megatron_salt.salt.stage_samples import StagedSamples
from megatron_salt.salt.teacher import Teacher
from megatron_salt.selection.selection_file import Selection, refuse_other_data
from megatron_salt.tokenizer.tokenizer import Tokenizer
from megatron_salt.train.exit import SignalWatch, refuse_exit_file
from megatron_salt.train.optim import build_optimizer, build_scheduler, wrap_in_ddp
from megatron_salt.train.plan import RunPlan, check_save_at, plan_the_rest
from megatron_salt.train.precisions import PLAIN, Precisions
from megatron_salt.train.step import Student

log = logging.getLogger(__name__)

PROBES = 16  # windows of a dataset


@dataclass(frozen=True)
class Inputs:
    """What is read from disk before any rank talks to another."""

    tokenizer: Tokenizer
    train: Samples
    valid: Samples | None
    teacher: TeacherCheckpoint | None
    """What --teacher-load says of itself; None without it, and where the run resumes in stage 2."""
    staged: StagedSamples | None
    """What each stage draws from; None without --stage1-selection."""


@dataclass(frozen=True)
class Run:
    """Everything the loop needs."""

    student: Student
    plan: RunPlan
    """Of the whole run, steps that are done included; as it is in the present stage."""

    train: Batches
    valid: Batches | None
    checkpointer: Checkpointer
    progress: Progress
    """Where it starts: step 0, or where the checkpoint ends."""

    stage1: Stage1 | None
    """None in stage 2, and in a run without a stage 1."""

    staged: StagedSamples | None
    """What each stage draws from; None: all of a run draws from one order."""


def read_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and data. Every rank, without torch.distributed; O(1) in the size of the data."""
    refuse_exit_file(config.training.exit_file)
    tokenizer = tokenizer_of_run(config.tokenizer, config.data, _checkpoint_tokenizer(config.checkpoint.load))
    train, valid = open_training_data(
        config.data, config.training.seq_length, config.training.seed, tokenizer.vocabulary_size, tokenizer.eod
    )
    if config.training.eval_iters and valid is None:
        raise UserError(
            f"--eval-iters {config.training.eval_iters} needs held-out data: give --valid-data-path or --valid-share"
        )
    for samples in (train, valid):
        if samples is not None:
            _probe(samples)
    teacher = None
    if config.salt.teacher_load is not None and not _resumes_in_stage2(
        config.checkpoint, evaluates=config.training.eval_iters > 0
    ):
        teacher = read_teacher(config.salt.teacher_load)
        refuse_unfit(teacher, config.salt, tokenizer.fingerprint, tokenizer.vocabulary_size, config.training.seq_length)
    staged = None
    if config.salt.stage1_selection is not None:
        staged = StagedSamples(train, Selection.open(config.salt.stage1_selection), config.salt.stage2_data)
    return Inputs(tokenizer, train, valid, teacher, staged)


def _probe(samples: Samples) -> None:
    """Look at a few windows of every dataset, first and last among them: data of another tokenizer is refused here and not hours later."""
    first = 0
    for windows in samples.windows:
        samples.tokens(first + np.unique(np.linspace(0, len(windows) - 1, PROBES).astype(np.int64)))
        first += len(windows)


def build(
    config: RunConfig, plan: RunPlan, layout: Layout, inputs: Inputs, identity: RunIdentity, timeout: timedelta,
    precisions: Precisions = PLAIN, held: contextlib.ExitStack | None = None, found: Found | None = None, watch: SignalWatch | None = None,
    look: Look = stay,
) -> Run:  # fmt: skip
    """Make the mesh, the student and its optimizer, and load the checkpoint that --load means. Collective over all ranks.

    identity: what `identify` says. held: gives --save free when the run ends; None: nobody else writes there. found: that checkpoint,
    where it is open already. watch: a signal ends the wait for another run's --save. look: called between the phases and inside the
    longest; raises LeftEarly.
    """
    mesh = make_student_mesh(layout, config.parallel.virtual_stages, timeout)
    seed_everything(config.training.seed, mesh)
    student = build_student(config, plan, inputs.tokenizer.vocabulary_size, mesh, precisions.student)
    look("building the model")
    checkpointer = Checkpointer(
        config.checkpoint, identity, inputs.tokenizer, mesh, student.chunks, student.optimizer, student.scheduler,
        None if held is None else own_save(config.checkpoint, held, watch),
    )  # fmt: skip
    loaded = checkpointer.load(found)
    progress = loaded or Progress(0, 0)
    step = progress.step

    def look_before_step(doing: str) -> None:
        try:
            look(doing)
        except LeftEarly as left:
            raise LeftEarly(left.reason, step) from None

    look_before_step("loading the checkpoint" if loaded else "making --save")
    plan = plan_the_rest(plan, config.training, progress.step, progress.consumed_samples)
    check_save_at(config.checkpoint.save_at, plan.total_steps)

    def batches(samples: Samples, skip: tuple[str, ...]) -> Batches:
        return Batches(
            samples,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            replica=mesh.at.dp,
            num_replicas=layout.data,
            skip=parse_skip_samples(skip),
        )

    run = Run(
        student=student,
        plan=plan,
        train=batches(inputs.train if inputs.staged is None else inputs.staged.stage1(), config.training.skip_samples),
        valid=None if inputs.valid is None else batches(inputs.valid, ()),
        checkpointer=checkpointer,
        progress=progress,
        stage1=None,
        staged=inputs.staged,
    )
    resumed = loaded is not None and progress.step > 0
    return in_its_stage(
        run, config, inputs, resumed=resumed, timeout=timeout, precision=precisions.teacher, look=look_before_step
    )


def own_save(checkpoint: CheckpointConfig, held: contextlib.ExitStack, watch: SignalWatch | None) -> Ownership | None:
    """Rank 0's hold on --save until `held` ends; None on other ranks. Collective: where it is another's, or holds checkpoints that
    this run does not come from, all raise UserError."""
    if checkpoint.save is None:
        return None
    save, mine = Path(checkpoint.save), []

    def take() -> None:
        if not checkpoint.take_over_save:
            refuse_living(save)
        retention.look(checkpoint)
        leaving = (lambda: False) if watch is None else (lambda: watch.received != 0)
        mine.append(acquire(save, myself(os.environ), checkpoint.take_over_save, leaving=leaving))

    try:
        from_rank_0(take)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        names = [path.name for path in save_directory.unfinished(save)] if full else []
        way = f"; what is left of unfinished saves may be deleted by hand: {', '.join(names)}" if names else ""
        raise UserError(f"--save {save} cannot be written: rank 0: {describe(error)}{way}") from None
    for ownership in mine:
        held.callback(ownership.release)
    return mine[0] if mine else None


def identify(config: RunConfig, inputs: Inputs, data: str) -> RunIdentity:
    """What a checkpoint must share with this run. data: `name_data`. Pure."""
    return RunIdentity(
        yaml=to_yaml(config),
        architecture=asdict(config.model)
        | {"seq_length": config.training.seq_length, "vocabulary": inputs.tokenizer.vocabulary_size},
        tokenizer_fingerprint=inputs.tokenizer.fingerprint,
        data_fingerprint=data,
        seed=config.training.seed,
        schedule_follows_run=schedule_follows_run(config.optimizer),
    )


def name_data(config: RunConfig, plan: RunPlan, inputs: Inputs) -> str:
    """What the run draws from, in which order. Not collective; reads blocks of each dataset. Raises UserError where a selection was
    made for other data than these, or is too small for them."""
    name = f"{inputs.train.fingerprint} in the order of --seed {config.training.seed}"
    staged, kd_steps = inputs.staged, config.salt.kd_steps
    if staged is None:
        return name
    assert kd_steps is not None
    datasets = list(inputs.train.dataset_facts())
    refuse_other_data(staged.selection, datasets, config.training.seq_length, inputs.tokenizer.fingerprint)
    drawn = np.array([min(kd_steps, plan.total_steps) * plan.global_batch_size])
    passed = int(passed_positions(drawn, parse_skip_samples(config.training.skip_samples))[0])
    staged.refuse_unfit(plan.global_batch_size, passed, has_stage2=kd_steps < plan.total_steps)
    return f"{name}, {staged.fingerprint}"


def in_its_stage(
    run: Run, config: RunConfig, inputs: Inputs, resumed: bool, timeout: timedelta, precision: Precision, look: Look = stay
) -> Run:
    """The run in the stage that its flags and its checkpoint ask for: in stage 1 with its teacher, where it has one, admitted.
    precision: the teacher's. Collective over all ranks. Raises UserError."""
    progress, teacher = run.progress, inputs.teacher
    schedule = None if config.salt.kd_steps is None else Schedule.of(config.salt)
    state, events = stage_of(config.salt, progress if resumed else None, teacher)
    run = replace(run, progress=replace(progress, salt=state, events=(*progress.events, *events)))
    if state is None:
        return run
    # Its flags may be gone with stage 1: then the evaluation that is due at its end goes without the teacher.
    due = run.valid is not None and config.training.eval_iters > 0 and progress.evaluation_due
    taught = schedule is not None and (None if teacher is None else teacher.fingerprint) == state.teacher
    if state.resumes_in(progress.step, due and taught) == 2:
        run, progress = in_stage2(run, run.progress)
        return replace(run, progress=progress)
    assert schedule is not None
    if teacher is None:
        return replace(run, stage1=Stage1(None, schedule))
    # Its held-out figures are computed anew: the held-out data, or how much of it is used, may be other than it was.
    run = replace(run, progress=replace(run.progress, salt=replace(state, teacher_held_out=None)))
    padded_vocabulary_size = config.model.padded_vocabulary_size(inputs.tokenizer.vocabulary_size)
    flops = forward_flops_per_token(teacher.model, config.training.seq_length, padded_vocabulary_size)
    admitted = admit_teacher(run, config, teacher, inputs.tokenizer.vocabulary_size, timeout, precision, look)
    return replace(run, stage1=Stage1(admitted, schedule, flops))


def stage_of(
    salt: SaltConfig, resumed: Progress | None, teacher: TeacherCheckpoint | None
) -> tuple[SaltProgress | None, Events]:
    """`salt_from` of these flags and this teacher. Pure."""
    schedule = None if salt.kd_steps is None else Schedule.of(salt)
    fingerprint = None if teacher is None else teacher.fingerprint
    directory = salt.teacher_load if teacher is None else str(teacher.directory)
    return salt_from(resumed, schedule, fingerprint, directory, salt.override_kd_schedule)


def refuse_large_exchange(
    salt: SaltConfig, training: TrainingConfig, plan: RunPlan, layout: Layout, teacher: TeacherCheckpoint
) -> float:
    """GiB of the teacher's hidden states that a rank of the last stage gets in a step. Raises UserError above --teacher-exchange-max-gib.
    Pure."""
    size, hidden = dtype_of(training).itemsize, teacher.model.hidden_size
    exchange = exchange_gib(layout, plan.num_microbatches, plan.micro_batch_size, training.seq_length, hidden, size)
    if exchange > salt.teacher_exchange_max_gib:
        raise UserError(
            f"the teacher's hidden states of a step would take {exchange:.3f} GiB on a rank of the student's last stage "
            f"({plan.num_microbatches} microbatches x {plan.micro_batch_size} samples x {training.seq_length} tokens x "
            f"{hidden} x {size} bytes / tp {layout.tensor} / cp {layout.context}), more than "
            f"--teacher-exchange-max-gib {salt.teacher_exchange_max_gib:g}"
        )
    return exchange


def admit_teacher(
    run: Run, config: RunConfig, checkpoint: TeacherCheckpoint, vocabulary_size: int, timeout: timedelta, precision: Precision,
    look: Look,
) -> Teacher:  # fmt: skip
    """The teacher over the student's ranks, after telling what it will cost. Collective over all ranks. Raises UserError."""
    salt, mesh, plan, training = config.salt, run.student.mesh, run.plan, config.training
    dtype, rows = dtype_of(training), config.model.padded_vocabulary_size(vocabulary_size) // mesh.layout.tensor
    layout = teacher_layout(mesh.layout, salt.teacher_tensor_model_parallel_size, salt.teacher_pipeline_model_parallel_size)
    exchange = refuse_large_exchange(salt, training, plan, mesh.layout, checkpoint)
    for line in warnings(mesh.layout, layout, plan.num_teacher_forwards):
        log.warning("%s", line)
    chunk_tokens = training.loss_chunk_tokens or chunk_tokens_for_budget(training.loss_chunk_mib, rows, dtype)
    alone = new_group_of([[rank] for rank in range(mesh.layout.world_size)], timeout)
    prediction = predict(
        config.model, config.parallel, checkpoint.model, teacher_tensor=salt.teacher_tensor_model_parallel_size,
        teacher_pipeline=salt.teacher_pipeline_model_parallel_size,
        padded_vocabulary_size=config.model.padded_vocabulary_size(vocabulary_size),
        num_microbatches=plan.num_microbatches, merge=plan.teacher_merge, seq_length=training.seq_length,
        head=measure_head(dtype, rows, config.model.hidden_size, chunk_tokens, alone),
    )  # fmt: skip
    dist.destroy_process_group(alone)
    for line in prediction.lines():
        log.info("%s", line)
    shard = VocabularyShard(mesh.groups.tp, rows, vocabulary_size, config.parallel.sequence_parallel)
    teacher = admit(
        checkpoint, salt, layout, mesh, shard, training.seq_length, chunk_tokens, dtype, plan.teacher_merge, timeout, precision,
        run.train.first(SAMPLES), look,
    )  # fmt: skip
    groups = run.student.optimizer.param_groups
    refuse_trainable(teacher, (tensor for group in groups for tensor in group["params"]))
    log.info(
        "teacher %s: tp %d, pp %d, %d replicas; it exchanges %.4f GiB a step and rank of the last stage",
        checkpoint.directory,
        layout.tensor,
        layout.pipeline,
        layout.data,
        exchange,
    )
    return teacher


def in_stage2(run: Run, progress: Progress) -> tuple[Run, Progress]:
    """The run from the end of stage 1 on: no teacher, --stage2-micro-batch-size, and --stage2-data from where stage 2 began, which is
    here unless the progress knows better. Pure."""
    plan = run.plan.in_stage2()
    train = run.train.in_microbatches_of(plan.micro_batch_size)
    if run.staged is not None:
        since = progress.data.get("stage2_since", progress.data.get("position", 0))
        train = train.going_on_with(run.staged.stage2(train.position(since)), since)
        progress = replace(progress, data={**progress.data, "stage2_since": since})
    run = replace(
        run,
        stage1=None,
        plan=plan,
        student=replace(run.student, micro_batch_size=plan.micro_batch_size),
        train=train,
        valid=None if run.valid is None else run.valid.in_microbatches_of(plan.micro_batch_size),
    )
    return run, progress


def build_student(config: RunConfig, plan: RunPlan, vocabulary_size: int, mesh: Mesh, precision: Precision = TORCH) -> Student:
    """The model with its optimizer and schedule, freshly initialised. Collective over all ranks."""
    training, dtype = config.training, dtype_of(config.training)
    rows = config.model.padded_vocabulary_size(vocabulary_size) // mesh.layout.tensor
    chunk_tokens = training.loss_chunk_tokens or chunk_tokens_for_budget(training.loss_chunk_mib, rows, dtype)
    model = build_model(
        config.model, config.parallel, training.seq_length, vocabulary_size, dtype, chunk_tokens, mesh, precision
    )
    chunks = wrap_in_ddp(model, config.parallel, mesh, precision)
    optimizer = build_optimizer(chunks, config.optimizer, config.parallel, dtype, mesh, precision)
    scheduler = build_scheduler(optimizer, config.optimizer, plan.total_samples, plan.global_batch_size)
    if mesh.is_last_stage:
        log.info(
            "output head: logits of %d tokens at a time, float32 weight gradient of %.1f MiB",
            chunk_tokens,
            weight_gradient_bytes(rows, config.model.hidden_size) / 2**20,
        )
    return Student(chunks, optimizer, scheduler, mesh, training.seq_length, plan.micro_batch_size, plan.global_batch_size)


def dtype_of(training: TrainingConfig) -> torch.dtype:
    """Of parameters and activations, the student's and the teacher's."""
    return torch.bfloat16 if training.bf16 else torch.float32


def count_parameters(student: Student) -> int:
    """Parameters of the whole model, a weight that pipeline stages share counted once. Collective over the model-parallel group."""
    count = sum(
        parameter.numel()
        for chunk in student.chunks
        for parameter in chunk.parameters()
        if not getattr(parameter, "shared", False)
        and (student.mesh.at.tp == 0 or getattr(parameter, "tensor_model_parallel", False))
    )
    total = torch.tensor(count, dtype=torch.int64, device=next(student.chunks[0].parameters()).device)
    dist.all_reduce(total, group=student.mesh.groups.mp)
    return int(total)


def _resumes_in_stage2(checkpoint: CheckpointConfig, evaluates: bool) -> bool:
    """Whether the checkpoint that --load most likely means needs no teacher. What is loaded in the end decides: see `in_its_stage`.
    evaluates: an evaluation that is due will be made."""
    if checkpoint.load is None or checkpoint.finetune:
        return False
    for directory in save_directory.candidates(Path(checkpoint.load), fallback=True)[: None if checkpoint.load_fallback else 1]:
        with contextlib.suppress(integrity.DamagedCheckpoint):
            facts = read_facts(directory)
            salt = SaltProgress.from_facts(facts["salt"])
            due = evaluates and facts["extra"].get(EVALUATION_DUE, False)
            return salt is not None and salt.resumes_in(facts["step"], due) == 2
    return False


def _checkpoint_tokenizer(load: str | None) -> Path | None:
    if load is None:
        return None
    found = save_directory.candidates(Path(load), fallback=True)
    return found[0] / TOKENIZER if found else None

"""What the planner reads beside the flags: the tokenizer's size, the teacher's architecture; and what follows for precision and saves.

In the child process, because these modules import torch. Everything that a start would refuse here is a UserError with its message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_salt.checkpoint import save_directory
from megatron_salt.config import ModelConfig, RunConfig, TrainingConfig
from megatron_salt.config.yaml_text import from_yaml
from megatron_salt.data.run_tokenizer import tokenizer_of_run
from megatron_salt.errors import UserError
from megatron_salt.model.precision import student_precision, teacher_precision
from megatron_salt.model.shapes import check_shapes
from megatron_salt.parallel.hardware import Hardware
from megatron_salt.planner.memory import HostMemory
from megatron_salt.planner.planned_run import RELEASES, PlannedRun, PlannedTeacher, RunFlags
from megatron_salt.planner.static import stage_tensors, student_bytes
from megatron_salt.salt.teacher_checkpoint import read_teacher, refuse_unfit, teacher_parallel
from megatron_salt.small_files import read_small
from megatron_salt.train.build_teacher import refuse_large_exchange
from megatron_salt.train.start import choose_precisions, parameters_of_rank, reshardable_save_bytes


def read_run(flags: RunFlags) -> PlannedRun:
    """Read what the flags name. Raises UserError."""
    return _planned(flags, *_read(flags))


def read_runs(candidates: Sequence[RunFlags]) -> list[PlannedRun | str]:
    """The same run in other layouts; where a start would refuse one, its message. Files are read once. Raises UserError."""
    vocabulary_size, teacher = _read(candidates[0])
    runs: list[PlannedRun | str] = []
    for flags in candidates:
        try:
            runs.append(_planned(flags, vocabulary_size, teacher))
        except UserError as error:
            runs.append(str(error))
    return runs


def _read(flags: RunFlags) -> tuple[int, _Teacher | None]:
    """(ids of the tokenizer, the teacher)."""
    vocabulary_size = flags.vocabulary_size or _tokenizer_size(flags.config)
    return vocabulary_size, _teacher(flags.config, flags.teacher_config, vocabulary_size)


def _planned(flags: RunFlags, vocabulary_size: int, teacher: _Teacher | None) -> PlannedRun:
    """The run in a layout. Raises UserError."""
    config = flags.config
    model = None if teacher is None else teacher.model
    if model is not None:
        check_shapes(model, teacher_parallel(config.salt), config.training.seq_length)
        refuse_large_exchange(config, flags.plan, flags.layout, model)
    if flags.device == "cpu":
        masks = config.data.reset_attention_mask
        student, taught = (
            student_precision(config.quantization, "torch", None, masks),
            teacher_precision(config.salt, "torch", None, masks),
        )
    else:
        precisions = choose_precisions(config, flags.plan, model, Hardware(flags.capability, **RELEASES))
        student, taught = precisions.student, precisions.teacher
    planned = None
    if teacher is not None:
        planned = PlannedTeacher(
            model=teacher.model, vocabulary_size=teacher.vocabulary_size, precision=taught, trained_tokens=teacher.tokens
        )
    return PlannedRun(
        config=config, layout=flags.layout, plan=flags.plan, vocabulary_size=vocabulary_size, precision=student,
        teacher=planned, device=flags.device, capability=flags.capability, cached_share=flags.cached_share,
    )  # fmt: skip


def _tokenizer_size(config: RunConfig) -> int:
    load = config.checkpoint.load
    found = [] if load is None else save_directory.candidates(Path(load), fallback=True)
    try:
        return tokenizer_of_run(
            config.tokenizer, config.data, found[0] / save_directory.TOKENIZER if found else None
        ).vocabulary_size
    except UserError as error:
        raise UserError(f"{error}; or give --vocabulary-size, to plan before the data is there") from None


class _Teacher(NamedTuple):
    model: ModelConfig
    vocabulary_size: int
    tokens: int | None
    """Of its training"""


def _teacher(config: RunConfig, path: str | None, vocabulary_size: int) -> _Teacher | None:
    """The teacher of the flags; None without one."""
    salt, length = config.salt, config.training.seq_length
    if salt.teacher_load is None:
        return None
    if path is None:
        try:
            teacher = read_teacher(salt.teacher_load)
        except UserError as error:
            raise UserError(f"{error}; or give --teacher-config, to plan before the teacher is there") from None
        refuse_unfit(teacher, salt, length)
        return _Teacher(teacher.model, teacher.vocabulary_size, None)
    try:
        text = read_small(Path(path)).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher-config {path} cannot be read: {error}") from None
    taught = from_yaml(text, path)
    return _Teacher(taught.model, vocabulary_size, _tokens(taught.training))


def _tokens(training: TrainingConfig) -> int | None:
    """Tokens of a training run; None where its flags leave them open."""
    samples = training.train_samples
    if samples is None and training.train_iters is not None and training.global_batch_size is not None:
        samples = training.train_iters * training.global_batch_size
    return None if samples is None else samples * training.seq_length


def host_memory(run: PlannedRun) -> HostMemory:
    """Host memory that the saves of a rank take. The rank with most parameters counts."""
    config, parallel, checkpoint = run.config, run.config.parallel, run.config.checkpoint
    if checkpoint.save is None:
        return HostMemory(staged=0, gathered=0)
    shards = run.layout.data * run.layout.context
    tensors = stage_tensors(
        config.model, parallel, rows=run.rows, seq_length=config.training.seq_length, precision=run.precision
    )
    staged = 0
    if checkpoint.async_save:
        held = [
            student_bytes(
                stage, parallel, run.layout, itemsize=run.itemsize, precision=run.precision, capability=run.capability
            )
            for stage in tensors
        ]
        share = shards if not parallel.use_distributed_optimizer else 1  # copies of one state are shared out among their ranks
        staged = max(one["parameters"] // shards + one["optimizer"] // share for one in held)
    gathered = 0
    if parallel.use_distributed_optimizer:
        padded = config.model.padded_vocabulary_size(run.vocabulary_size)
        parameters = parameters_of_rank(config.model, parallel, padded, config.training.seq_length)
        gathered = reshardable_save_bytes(parameters, padded * config.model.hidden_size // run.layout.tensor, parallel, shards)
    return HostMemory(staged=staged, gathered=gathered)

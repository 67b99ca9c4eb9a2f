"""Reads a run's inputs before any rank talks to another: tokenizer, data, selection and the record of the teacher.

Every rank reads the same files. The time does not grow with the size of the data.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_salt.checkpoint import integrity, save_directory
from megatron_salt.checkpoint.state_file import read_state
from megatron_salt.config import CheckpointConfig, RunConfig
from megatron_salt.config.teaching import parse_gate, refuse_idle_gate
from megatron_salt.data.run_tokenizer import tokenizer_of_run
from megatron_salt.data.samples import Samples, open_training_data
from megatron_salt.errors import UserError
from megatron_salt.evaluation.evaluate_task import PreparedTask
from megatron_salt.evaluation.in_training import read_eval_tasks
from megatron_salt.salt.shared_vocabulary import shared_ids
from megatron_salt.salt.stage1 import resumes_in_stage2
from megatron_salt.salt.stage_samples import StageSamples
from megatron_salt.salt.teacher_checkpoint import TeacherCheckpoint, read_teacher, refuse_unfit
from megatron_salt.selection.selection_file import Selection
from megatron_salt.tokenizer.tokenizer import Tokenizer

WINDOWS_READ = 16  # of each dataset, at the start


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tokenizer, data, teacher's record and selection of a run."""

    tokenizer: Tokenizer
    train: Samples
    valid: dict[str, Samples]
    """Held-out data by the name of its set: "valid", or "valid/NAME" for each named set. Empty: there is none."""
    teacher: TeacherCheckpoint | None
    """What the checkpoint in --teacher-load says of itself; None without the flag, and where the run resumes in stage 2."""
    shared_ids: int
    """Ids that mean the same to teacher and student: those from 0 up to it. Without soft labels all of the tokenizer's."""
    stage_samples: StageSamples | None
    """The samples of both stages; None without --stage1-selection."""
    tasks: tuple[PreparedTask, ...] = ()
    """The tasks of --eval-tasks."""


def read_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer, data, teacher and selection. Every rank calls, without torch.distributed. Raises UserError."""
    tokenizer = tokenizer_of_run(config.tokenizer, config.data, _checkpoint_tokenizer(config.checkpoint.load))
    train, valid = open_training_data(
        config.data, config.training.seq_length, config.training.seed, tokenizer.vocabulary_size, tokenizer.eod
    )
    if config.training.eval_iters and not valid:
        raise UserError(
            f"--eval-iters {config.training.eval_iters} needs held-out data: give --valid-data-path or --valid-share"
        )
    for samples in (train, *valid.values()):
        _read_some_windows(samples)
    teacher = None
    if config.salt.teacher_load is not None and not _needs_no_teacher(config.checkpoint, config.training.eval_iters > 0):
        teacher = read_teacher(config.salt.teacher_load)
        refuse_unfit(teacher, config.salt, config.training.seq_length)
    stage_samples = None
    if config.salt.stage1_selection is not None:
        stage_samples = StageSamples(train, Selection.open(config.salt.stage1_selection), config.salt.stage2_data)
    taught = teacher is not None and config.salt.has_soft_labels
    shared = shared_ids(teacher, tokenizer) if teacher is not None and taught else tokenizer.vocabulary_size
    if taught:
        refuse_idle_gate(parse_gate(config.salt.kd_gate), shared)
    return Inputs(
        tokenizer=tokenizer,
        train=train,
        valid=valid,
        teacher=teacher,
        shared_ids=shared,
        stage_samples=stage_samples,
        tasks=read_eval_tasks(config.training, tokenizer),
    )


def _read_some_windows(samples: Samples) -> None:
    """Read a few windows of every dataset, its first and last among them, so that data of another tokenizer is refused at the start."""
    first = 0
    for windows in samples.windows:
        samples.tokens(first + np.unique(np.linspace(0, len(windows) - 1, WINDOWS_READ).astype(np.int64)))
        first += len(windows)


def _needs_no_teacher(checkpoint: CheckpointConfig, evaluates: bool) -> bool:
    """Whether --load's newest checkpoint is in stage 2, so that no teacher has to be read.

    build.py decides again, by the checkpoint that it loads. evaluates: an evaluation that is due will be made."""
    if checkpoint.load is None or checkpoint.finetune:
        return False
    for directory in save_directory.candidates(Path(checkpoint.load), fallback=True)[: None if checkpoint.load_fallback else 1]:
        with contextlib.suppress(integrity.DamagedCheckpoint):
            return resumes_in_stage2(read_state(directory).run, evaluates)
    return False


def _checkpoint_tokenizer(load: str | None) -> Path | None:
    """Directory of the tokenizer in the newest checkpoint of --load; None where there is none."""
    if load is None:
        return None
    directories = save_directory.candidates(Path(load), fallback=True)
    return directories[0] / save_directory.TOKENIZER if directories else None

"""What the training of teachers took, and the size of the vocabulary: from the study's data and from checkpoints of teachers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_salt.checkpoint.save_directory import candidates
from megatron_salt.config import ModelConfig, RunConfig
from megatron_salt.errors import UserError
from megatron_salt.model.flops import flops_per_token, forward_flops_per_token
from megatron_salt.study.definition.arms import build, training_flops
from megatron_salt.study.definition.plan_jobs import TeacherFacts
from megatron_salt.study.definition.study import Study, Teacher
from megatron_salt.train.plan import check


def read_teacher_facts(study: Study, teachers: Collection[str]) -> TeacherFacts:
    """The facts of these teachers. Reads the tokenizer beside the data, and the state of checkpoints. Raises UserError."""
    vocabulary_size = vocabulary_of(study)
    return TeacherFacts(
        vocabulary_size=vocabulary_size,
        training_flops={name: _training_flops(study.teachers[name], vocabulary_size) for name in teachers},
    )


def vocabulary_of(study: Study) -> int:
    """Ids of the tokenizer of the study's data. Raises UserError."""
    from megatron_salt.data.run_tokenizer import tokenizer_of_run

    config = build(study.sections)
    return tokenizer_of_run(config.tokenizer, config.data, None).vocabulary_size


def _training_flops(teacher: Teacher, vocabulary_size: int) -> float:
    """FLOPs of a teacher's training: told, computed from its configuration, or from the samples that its checkpoint has seen."""
    if teacher.training_flops is not None:
        return teacher.training_flops
    if teacher.sections is not None:
        return training_flops(build(teacher.sections), teacher.ranks, vocabulary_size)
    assert teacher.load is not None
    trained = checkpoint_training_flops(Path(teacher.load))
    if trained is None:
        raise UserError(
            f"teacher {teacher.name}: {teacher.load} does not tell what its training took; give training_flops: beside load:"
        )
    return trained


def checkpoint_training_flops(load: Path) -> float | None:
    """FLOPs of the plain training behind a checkpoint: those of the student alone. None: it was imported or grown.

    Exact where all of it had one sequence length; a teacher that taught it is not counted. Raises UserError where there is no checkpoint.
    """
    from megatron_salt.checkpoint.state_file import model_of, read_state

    paths = candidates(load, flag_name="teacher: load")
    if not paths:
        raise UserError(f"teacher: load: {load} holds no checkpoint")
    state = read_state(paths[0])
    if not state.run.consumed_samples or state.seq_length is None or state.vocabulary_size is None:
        return None
    model = model_of(state.architecture)
    token = flops_per_token(model, state.seq_length, model.padded_vocabulary_size(state.vocabulary_size))
    return token * state.seq_length * state.run.consumed_samples


def model_of_teacher(study: Study, name: str) -> ModelConfig:
    """Architecture of a teacher. Raises UserError where its checkpoint cannot be read."""
    teacher = study.teachers[name]
    if teacher.sections is not None:
        return build(teacher.sections).model
    from megatron_salt.salt.teacher_checkpoint import read_teacher

    assert teacher.load is not None
    return read_teacher(teacher.load).model


@dataclass(frozen=True)
class PlannedFlops:
    """FLOPs of a run before it begins."""

    student: float
    teacher: float
    """Forward passes of the teacher in stage 1"""


def planned_flops(config: RunConfig, ranks: int, vocabulary_size: int, teacher: ModelConfig | None) -> PlannedFlops:
    """FLOPs of a run as its log will count them, if stage 1 lasts --kd-steps. Raises UserError."""
    _, plan = check(config, ranks)
    length, rows = config.training.seq_length, config.model.padded_vocabulary_size(vocabulary_size)
    taught = 0 if teacher is None or config.salt.kd_steps is None else min(config.salt.kd_steps, plan.total_steps)
    tokens = taught * plan.global_batch_size * length
    forward = 0.0 if teacher is None else forward_flops_per_token(teacher, length, rows)
    return PlannedFlops(training_flops(config, ranks, vocabulary_size), tokens * forward)

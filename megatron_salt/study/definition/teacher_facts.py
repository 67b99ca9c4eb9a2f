"""FLOPs of teachers' training, and of all jobs before they begin: from the study's data and from checkpoints of teachers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_salt.checkpoint.save_directory import candidates
from megatron_salt.config import ModelConfig, RunConfig
from megatron_salt.data.blend import parse_data_path
from megatron_salt.data.manifest import read_manifest
from megatron_salt.errors import UserError
from megatron_salt.model.flops import body_flops, flops_per_token, forward_flops_per_token, head_flops
from megatron_salt.study.definition.arms import build, training_flops
from megatron_salt.study.definition.plan_jobs import StudyPlan, TeacherFacts
from megatron_salt.study.definition.preparation import scoring_name
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


def planned_flops(study: Study, plan: StudyPlan) -> dict[str, float | None]:
    """{job: FLOPs}, as logs will count them, if stage 1 lasts --kd-steps and no window is skipped. None: the size of the data is not known.

    Reads the tokenizer beside the data, manifests and checkpoints of teachers. Raises UserError.
    """
    vocabulary_size, models = vocabulary_of(study), {name: model_of_teacher(study, name) for name in study.teachers}
    teachers = {run.job: models[run.teacher] for run in plan.runs if run.teacher is not None}
    ranks = {job.name: job.ranks for job in plan.jobs}
    flops: dict[str, float | None] = {
        name: run_flops(config, ranks[name], vocabulary_size, teachers.get(name)) for name, config in plan.configs.items()
    }
    for run in plan.runs:
        arm = study.arm(run.arm)
        if arm.selection is None or arm.teacher is None:
            continue
        scoring = scoring_name(study.teachers[arm.teacher], arm.selection)
        rows = run.config.model.padded_vocabulary_size(vocabulary_size)
        token = forward_flops_per_token(models[arm.teacher], run.config.training.seq_length, rows)
        tokens = _tokens(run.config)
        flops[scoring] = None if tokens is None else tokens * (arm.selection.sample or 1.0) * token
    return {job.name: flops.get(job.name, 0.0) for job in plan.jobs}


def run_flops(config: RunConfig, ranks: int, vocabulary_size: int, teacher: ModelConfig | None) -> float:
    """FLOPs of a run: of the student, and of the teacher's forward passes in stage 1. Raises UserError."""
    student = training_flops(config, ranks, vocabulary_size)
    if teacher is None or config.salt.teacher_load is None:
        return student
    _, plan = check(config, ranks)
    length, rows = config.training.seq_length, config.model.padded_vocabulary_size(vocabulary_size)
    layers, head = (
        min(steps or 0, plan.total_steps) * plan.global_batch_size * length
        for steps in (config.salt.stage1_steps, config.salt.kd_steps)
    )
    return student + layers * body_flops(teacher, length) + head * head_flops(teacher, rows)


def _tokens(config: RunConfig) -> int | None:
    """Tokens of a run's training data; None where a dataset has no manifest."""
    manifests = [read_manifest(prefix) for prefix in parse_data_path(config.data.data_path, "--data-path")[0]]
    return sum(found.tokens for found in manifests if found is not None) if all(manifests) else None

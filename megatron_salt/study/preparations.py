"""What a study did before each run, read from files of its jobs: the teacher's training, scores, selection, the model that is stacked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from megatron_salt.config import ModelConfig
from megatron_salt.errors import UserError
from megatron_salt.metrics.history import Curve, read_curve
from megatron_salt.salt.cost import scoring_flops
from megatron_salt.selection.score_format import read_index
from megatron_salt.small_files import read_small
from megatron_salt.study.analysis.ledger import NOTHING, UNKNOWN, Preparation, PreparationOf, Spent
from megatron_salt.study.definition.plan_jobs import StudyPlan
from megatron_salt.study.definition.preparation import checkpoints_of
from megatron_salt.study.definition.study import Study, Teacher
from megatron_salt.study.definition.teacher_facts import checkpoint_training_flops, model_of_teacher
from megatron_salt.study.job import Job

LOG = "train.jsonl"
_SCORED = re.compile(r"^shard \S+: finished: .* in (\d+\.\d) s, ", re.MULTILINE)
_CHOSEN = re.compile(r"^chosen in (\d+\.\d) s$", re.MULTILINE)


def read_preparations(study: Study, plan: StudyPlan) -> PreparationOf:
    """The preparation of each run of the plan, as far as it is done now. What is not done yet costs nothing, or is not known."""
    jobs = {job.name: job for job in plan.jobs}
    models = {name: _model(study, name) for name in study.teachers}
    trainings = {name: _of_teacher(study, teacher) for name, teacher in study.teachers.items()}
    found: dict[tuple[str, int], Preparation] = {}
    for run in plan.runs:
        preparation = Preparation(runs_that_share=study.teacher_shared_by)
        if run.teacher is not None:
            preparation = replace(preparation, teacher=models[run.teacher], teacher_training=trainings[run.teacher])
        for need in (jobs[name] for name in jobs[run.job].needs):
            if need.kind == "select":
                scores = _scoring(jobs[need.needs[0]], preparation.teacher)
                preparation = replace(preparation, selection=Spent(0.0, _seconds(need, _CHOSEN)), scoring=scores)
            elif need.kind == "grow":
                preparation = replace(preparation, grow_source=_training(jobs[need.needs[0]].directory))
        found[run.label, run.seed] = preparation
    return lambda result: found[result.label, result.seed]


def _model(study: Study, teacher: str) -> ModelConfig | None:
    try:
        return model_of_teacher(study, teacher)
    except UserError:
        return None


def _of_teacher(study: Study, teacher: Teacher) -> Spent:
    """Training of a teacher: from its log; without one, the FLOPs that STUDY.yaml or its checkpoint tells."""
    directory = checkpoints_of(study, teacher)
    found = _training(directory)
    if teacher.training_flops is not None:
        return replace(found, flops=teacher.training_flops)
    if found.flops is not None or teacher.load is None:
        return found
    try:
        return replace(found, flops=checkpoint_training_flops(directory))
    except UserError:
        return found


def _training(directory: Path) -> Spent:
    """A training, from its log; not known where there is no whole one, as for a teacher that came without."""
    curve = _curve(directory / LOG)
    if curve is None or not curve.is_whole:
        return UNKNOWN
    return Spent(None if curve.flops is None else float(curve.flops[-1]), float(curve.seconds[-1]))


def _curve(path: Path) -> Curve | None:
    try:
        return read_curve(path.parent.name, path)
    except UserError:
        return None


def _scoring(job: Job, teacher: ModelConfig | None) -> Spent:
    try:
        manifest = read_index(job.directory / "index", "scores")
    except UserError:
        return NOTHING
    return Spent(0.0 if teacher is None else scoring_flops(manifest, teacher), _seconds(job, _SCORED))


def _seconds(job: Job, told: re.Pattern[str]) -> float:
    """Seconds that a tool says it took, in the last start of its log; 0 where it does not say."""
    try:
        found = told.findall(read_small(job.log).decode("utf-8", errors="replace"))
    except (OSError, ValueError):
        return 0.0
    return float(found[-1]) if found else 0.0

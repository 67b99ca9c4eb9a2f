"""From a Study to its jobs: teachers, scores, selections, models to stack, runs. Pure: the same study gives the same jobs.

A job of training has its whole configuration in config.yaml of its directory, from which it is started. Jobs that several runs need are
there once. Runs come seed by seed, so that a study that is stopped half-way has whole pairs. `preparation.py` says where what lies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_salt.config import RunConfig, flag
from megatron_salt.config.run import field_types, sections
from megatron_salt.errors import UserError
from megatron_salt.study.definition.arms import Inputs, arm_flags, overlaid, takes
from megatron_salt.study.definition.evaluations import refuse_unknown_figures
from megatron_salt.study.definition.preparation import (
    as_text,
    checkpoints_of,
    place_of,
    score_job,
    select_job,
    selection_of,
    shallow_config,
    stack_job,
    stacked_of,
    trainable,
)
from megatron_salt.study.definition.study import Arm, Study, Teacher
from megatron_salt.study.job import FINETUNE, TRAINER, CachedStage1, Job
from megatron_salt.study.results import Kind
from megatron_salt.train.plan import RunPlan, check

CONFIG = "config.yaml"
"""In the directory of a job of training: what it is started with"""
JobKind = Literal["teacher", "score", "select", "grow", "run"]


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of the study: an arm with one seed and one value on at most one axis."""

    arm: str
    kind: Kind
    seed: int
    settings: Mapping[str, str]
    """{axis: value as text}"""
    directory: Path
    config: RunConfig
    job: str
    """Name of its job"""
    teacher: str | None
    """Name of the teacher that stands behind it"""

    @property
    def label(self) -> str:
        """Arm and settings, as RunResult has them."""
        return " ".join([self.arm, *(f"{axis}={value}" for axis, value in self.settings.items())])


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """Everything that a study does."""

    jobs: tuple[Job, ...]
    """Each after those that it needs"""
    runs: tuple[StudyRun, ...]
    configs: Mapping[str, RunConfig]
    """{job: configuration} of every job of training"""

    def part(self, arms: Collection[str], seeds: Collection[int]) -> StudyPlan:
        """The runs of these arms and seeds, and what they need."""
        runs = tuple(run for run in self.runs if run.arm in arms and run.seed in seeds)
        needed = {run.job for run in runs}
        for job in reversed(self.jobs):
            if job.name in needed:
                needed.update(job.needs)
        jobs = tuple(job for job in self.jobs if job.name in needed)
        return StudyPlan(jobs=jobs, runs=runs, configs={name: self.configs[name] for name in self.configs if name in needed})


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """What LONGER needs to know, from data and checkpoints."""

    vocabulary_size: int
    """Ids of the data's tokenizer"""
    training_flops: Mapping[str, float]
    """{teacher: FLOPs of its training}"""


def plan_jobs(study: Study, facts: TeacherFacts | None) -> StudyPlan:
    """The jobs of a study. Raises UserError, which names arm and seed, where a run's flags are refused.

    facts: needed where an arm is of kind longer.
    """
    planner = _Planner(study, facts)
    refuse_unknown_figures(study, planner.config_of(study.arms[0], study.seeds[0], {}))
    for seed in study.seeds:
        for arm in study.arms:
            for setting in _settings(study, arm, planner):
                planner.add_run(arm, seed, setting)
    _refuse_shared_directories(planner.jobs.values())
    return StudyPlan(jobs=tuple(_in_order(planner.jobs.values())), runs=tuple(planner.runs), configs=planner.configs)


def _settings(study: Study, arm: Arm, planner: _Planner) -> list[dict[str, Any]]:
    """{field: value} of an arm's runs: none, then each value of each axis that differs from the arm's own."""
    found: list[dict[str, Any]] = [{}]
    own = planner.config_of(arm, study.seeds[0], {})
    for axis, values in study.axes.items():
        home = next(name for name, section in sections().items() if axis in field_types(section))
        if takes(arm, axis):
            found += [{axis: value} for value in values if value != getattr(getattr(own, home), axis)]
    return found


class _Planner:
    """Collects jobs by name: a job that several runs need is made once, and must then be the same."""

    def __init__(self, study: Study, facts: TeacherFacts | None) -> None:
        self.study, self.facts = study, facts
        self.jobs: dict[str, Job] = {}
        self.runs: list[StudyRun] = []
        self.configs: dict[str, RunConfig] = {}

    def config_of(self, arm: Arm, seed: int, setting: Mapping[str, Any]) -> RunConfig:
        """The configuration of a run. Raises UserError that names arm and seed."""
        study, directory = self.study, self.study.output / "runs" / place_of(arm, seed, setting)
        try:
            teacher = None if arm.teacher is None else study.teachers[arm.teacher]
            facts = self.facts if arm.kind == "longer" else None
            inputs = Inputs(
                teacher_load=None if teacher is None else str(checkpoints_of(study, teacher)),
                stage1_selection=None if arm.selection is None else str(selection_of(study, arm, seed)),
                teacher_flops=None if facts is None or teacher is None else facts.training_flops[teacher.name],
                vocabulary_size=None if facts is None else facts.vocabulary_size,
            )
            flags = arm_flags(arm, study.salt, setting, study.sections, study.ranks, inputs)
            config = trainable(overlaid(study.sections, {"load": str(directory)} | flags), directory, seed)
            check(config, study.ranks)
        except UserError as error:
            told = "".join(f", {flag(name)} {as_text(value)}" for name, value in setting.items())
            raise UserError(f"arm {arm.name}, seed {seed}{told}: {error}") from error
        return config

    def add_run(self, arm: Arm, seed: int, setting: Mapping[str, Any]) -> None:
        """Add a run and what it needs."""
        study, place = self.study, place_of(arm, seed, setting)
        config = self.config_of(arm, seed, setting)
        needs: list[str] = []
        begin: tuple[str, ...] = ()
        if config.salt.teacher_load is not None:
            assert arm.teacher is not None
            needs += self._teacher(study.teachers[arm.teacher])
        if config.salt.stage1_selection is not None:
            needs.append(self._selection(arm, seed, config))
        if arm.grow is not None:
            needs.append(self._grown(arm, config, place))
            begin = ("--load", str(stacked_of(study, place)), FINETUNE)
        settings = {axis: as_text(value) for axis, value in setting.items()}
        name = "-".join(place.parts)
        run = StudyRun(
            arm=arm.name,
            kind=arm.kind,
            seed=seed,
            settings=settings,
            directory=study.output / "runs" / place,
            config=config,
            job=name,
            teacher=arm.teacher,
        )
        self.runs.append(run)
        self._training(name, "run", config, study.ranks, needs, run, begin)

    def _teacher(self, teacher: Teacher) -> list[str]:
        """Names of the jobs that make a teacher: none where it exists."""
        if teacher.sections is None:
            return []
        directory = checkpoints_of(self.study, teacher)
        name = "teacher" if teacher.name == "teacher" else f"teacher-{teacher.name}"
        steps = {arm.selection.scorer_step for arm in self.study.arms if arm.selection and arm.teacher == teacher.name}
        save_at = tuple(sorted(step for step in steps if step is not None))
        try:
            seed = teacher.sections.get("training", {}).get("seed", RunConfig().training.seed)
            settings = overlaid(teacher.sections, {"load": str(directory), "save_at": save_at})
            config = trainable(settings, directory, seed)
            check(config, teacher.ranks)
        except UserError as error:
            raise UserError(f"teacher {teacher.name}: {error}") from error
        self._training(name, "teacher", config, teacher.ranks)
        return [name]

    def _training(
        self,
        name: str,
        kind: JobKind,
        config: RunConfig,
        ranks: int,
        needs: Iterable[str] = (),
        run: StudyRun | None = None,
        begin: tuple[str, ...] = (),
    ) -> None:
        """Add a job of training. begin: flags of a start without a checkpoint of its own."""
        assert config.checkpoint.save is not None
        directory, plan = Path(config.checkpoint.save), check(config, ranks)[1]
        self.configs[name] = config
        job = Job(
            name=name,
            kind=kind,
            command=("-m", TRAINER, "--config", str(directory / CONFIG), *begin),
            ranks=ranks,
            directory=directory,
            needs=tuple(needs),
            arm="" if run is None else run.label,
            seed=None if run is None else run.seed,
            steps=plan.total_steps,
            cached=_cached_stage1(config, plan),
        )
        self._add(job)

    def _selection(self, arm: Arm, seed: int, config: RunConfig) -> str:
        """Name of the job that chooses the windows of a run; also adds the job that scores."""
        assert arm.teacher is not None
        teacher = self.study.teachers[arm.teacher]
        scoring = score_job(self.study, teacher, arm, config, self._teacher(teacher))
        self._add(scoring)
        choosing = select_job(self.study, arm, seed, config, scoring)
        self._add(choosing)
        return choosing.name

    def _grown(self, arm: Arm, config: RunConfig, place: Path) -> str:
        """Name of the job that stacks a run's first weights; also adds the job that trains what is stacked."""
        try:
            shallow = shallow_config(self.study, arm, config, place)
            check(shallow, self.study.ranks)
        except UserError as error:
            raise UserError(f"arm {arm.name}, the model that is stacked: {error}") from error
        source = f"source-{'-'.join(place.parts)}"
        self._training(source, "grow", shallow, self.study.ranks)
        stacking = stack_job(self.study, config, place, source)
        self._add(stacking)
        return stacking.name

    def _add(self, job: Job) -> None:
        known = self.jobs.setdefault(job.name, job)
        if known != job:
            raise UserError(
                f"job {job.name} would have two commands, {' '.join(known.command)} and {' '.join(job.command)}: runs that share "
                "scores or a selection must have the same data, --seq-length and device"
            )


def _cached_stage1(config: RunConfig, plan: RunPlan) -> CachedStage1 | None:
    salt = config.salt
    if salt.teacher_cache is None or salt.stage1_steps is None:
        return None
    order = (salt.teacher_cache, salt.teacher_load, salt.stage1_selection, config.training.seed, plan.global_batch_size)
    return CachedStage1(order, min(salt.stage1_steps, plan.total_steps))


def _refuse_shared_directories(jobs: Iterable[Job]) -> None:
    seen: dict[Path, str] = {}
    for job in jobs:
        if (other := seen.setdefault(job.directory, job.name)) != job.name:
            raise UserError(f"{job.name} and {other} would both have the directory {job.directory}; rename an arm or a value")


def _in_order(jobs: Iterable[Job]) -> list[Job]:
    """Teachers, scores, selections, models to stack, runs; otherwise as they were planned."""
    order = ("teacher", "score", "select", "grow", "run")
    return sorted(jobs, key=lambda job: order.index(job.kind))

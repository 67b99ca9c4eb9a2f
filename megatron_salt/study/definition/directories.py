"""What the directories of a study hold already, and whether this study may go on in them.

A job of training has its configuration in config.yaml, any other its command in command.txt. A directory in which work has begun with
another configuration is refused by name, with both values. Arms, seeds and values may be added to a study at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_salt.checkpoint.save_directory import candidates, whole_checkpoints
from megatron_salt.config import RunConfig, flag
from megatron_salt.config.run import sections
from megatron_salt.config.yaml_text import from_yaml, to_yaml
from megatron_salt.data.blend import parse_data_path, parse_valid_data_path
from megatron_salt.data.indexed_dataset import refuse_missing
from megatron_salt.errors import UserError
from megatron_salt.files import write_whole
from megatron_salt.small_files import read_small
from megatron_salt.study.definition.plan_jobs import CONFIG, StudyPlan
from megatron_salt.study.definition.study import Study
from megatron_salt.study.job import Job, goes_on

COMMAND = "command.txt"
STUDY = "study.yaml"
_LOG = "train.jsonl"
_TOLD = 4  # differing flags in a message
_MAY_DIFFER = {"checkpoint": {"save_at"}}
"""An added arm may need a step of the teacher to be kept; `_refuse_missing_steps` looks whether it is there."""


def refuse_other_work(plan: StudyPlan) -> None:
    """Raise UserError where a directory holds what another study made, or this one with other flags."""
    for job in plan.jobs:
        if job.trains:
            if _has_begun(job.directory):
                _refuse_other_config(job.directory, plan.configs[job.name])
                _refuse_missing_steps(job.directory, plan.configs[job.name].checkpoint.save_at)
        elif job.outcome.exists():
            _refuse_other_command(job)


def refuse_missing_inputs(study: Study, plan: StudyPlan) -> None:
    """Raise UserError where data or a teacher that the study does not make is not there: runs would find out one by one."""
    named = {
        (word, flag_name)
        for config in plan.configs.values()
        for words, flag_name in (
            (config.data.data_path, "--data-path"),
            *((words, "--valid-data-path") for words in parse_valid_data_path(config.data.valid_data_path).values()),
        )
        for word in (parse_data_path(words, flag_name)[0] if words else ())
    }
    for prefix, flag_name in sorted(named):
        refuse_missing(prefix, flag_name)
    for teacher in study.teachers.values():
        if teacher.load is None:
            continue
        load = Path(teacher.load)
        if not candidates(load, flag_name=f"teacher {teacher.name}: load:"):
            raise UserError(f"teacher {teacher.name}: load: {load} holds no checkpoint; a path is relative to {Path.cwd()}")
        steps = {arm.selection.scorer_step for arm in study.arms if arm.selection and arm.teacher == teacher.name}
        kept = whole_checkpoints(load)
        for step in sorted(step for step in steps if step is not None and step not in kept):
            raise UserError(
                f"teacher {teacher.name}: {load} has no checkpoint of step {step} (scorer_step); it has {', '.join(map(str, kept))}"
            )


def begin(plan: StudyPlan, output: Path, text: bytes) -> tuple[Job, ...]:
    """Write what the jobs are started with. Returns the jobs as they are to be started now. Raises OSError.

    text: the study's file, kept as OUTPUT/study.yaml.
    """
    output.mkdir(parents=True, exist_ok=True)
    _write_changed(output / STUDY, text)
    for job in plan.jobs:
        job.directory.mkdir(parents=True, exist_ok=True)
        if job.trains:
            _write_changed(job.directory / CONFIG, to_yaml(plan.configs[job.name]).encode())
        else:
            _write_changed(job.directory / COMMAND, _line(job).encode())
    return tuple(
        replace(job, command=goes_on(job.command)) if job.trains and whole_checkpoints(job.directory) else job
        for job in plan.jobs
    )


def other_runs(plan: StudyPlan, output: Path) -> list[Path]:
    """Directories of runs under OUTPUT that the study does not have (any more). They stay, and no figure counts them."""
    known = {run.directory for run in plan.runs}
    return sorted(path.parent for path in (output / "runs").rglob(f"seed_*/{CONFIG}") if path.parent not in known)


def differences(there: RunConfig, here: RunConfig) -> list[str]:
    """Every flag that differs, with both values. Pure."""
    return [
        f"{flag(name)} is {_word(value)} there and {_word(getattr(getattr(here, section), name))} here"
        for section in sections()
        for name, value in vars(getattr(there, section)).items()
        if name not in _MAY_DIFFER.get(section, ()) and value != getattr(getattr(here, section), name)
    ]


def _has_begun(directory: Path) -> bool:
    """Whether a training has done something in a directory. One that was refused at its start has not."""
    return (directory / _LOG).exists() or bool(whole_checkpoints(directory))


def _refuse_other_config(directory: Path, here: RunConfig) -> None:
    path = directory / CONFIG
    try:
        there = from_yaml(read_small(path).decode("utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds a run that no study began (it has no {CONFIG}); give another output:, or move it away"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, so nobody knows which run {directory} holds: {error}") from None
    found = differences(there, here)
    if found:
        more = "" if len(found) <= _TOLD else f"; and {len(found) - _TOLD} more"
        raise UserError(
            f"{directory} holds a run with other flags: {'; '.join(found[:_TOLD])}{more}. Give the arm another name or the study "
            "another output:, or move the directory away"
        )


def _refuse_missing_steps(directory: Path, steps: Sequence[int]) -> None:
    """Raise UserError where a teacher is past a step that is to score, and did not keep it."""
    kept = whole_checkpoints(directory)
    missing = [step for step in steps if kept and step <= max(kept) and step not in kept]
    if missing:
        raise UserError(
            f"{directory} has no checkpoint of step {', '.join(map(str, missing))} (scorer_step), and its training is past it; it "
            f"has {', '.join(map(str, kept))}"
        )


def _refuse_other_command(job: Job) -> None:
    path = job.directory / COMMAND
    try:
        there = read_small(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, so nobody knows what {job.directory} holds: {error}") from None
    if there != _line(job):
        raise UserError(
            f"{job.directory} was made by another command: {there.strip()} there, {_line(job).strip()} here. Move it away, or give "
            "the study another output:"
        )


def _line(job: Job) -> str:
    return " ".join(job.command) + "\n"


def _write_changed(path: Path, content: bytes) -> None:
    """Write a file, unless it has this content."""
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

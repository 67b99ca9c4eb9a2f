"""When the runs of a study will be done, from the step times that this study has measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_salt.study.job import Job
from megatron_salt.study.jobs.progress import Progress
from megatron_salt.study.jobs.status import ENDED, Status


@dataclass(frozen=True)
class Estimate:
    """Seconds left."""

    jobs: Mapping[str, float | None]
    """Of each job that is not over, while it runs; None: no step time is known. Jobs that train nothing are missing: they log no steps"""
    study: float | None
    """Until the last job ends, with the jobs that wait; None: nothing is known yet"""
    is_whole: bool
    """Whether `study` counts every job. Jobs that train nothing, and those without a step time, count as 0 s"""


def estimate(jobs: Sequence[Job], statuses: Mapping[str, Status], progress: Mapping[str, Progress], at_once: int) -> Estimate:
    """The seconds left of each job and of the study. at_once: jobs that run at the same time.

    A job's step takes what its own last steps took; before its first step, what runs of its arm took, or else all runs of the study.
    """
    left: dict[str, float | None] = {}
    active = [job for job in jobs if statuses[job.name].state not in ENDED]
    for job in active:
        if job.steps:
            pace = _pace(job, jobs, statuses, progress)
            left[job.name] = None if pace is None else max(0, job.steps - progress[job.name].step) * pace
    is_whole = all(left.get(job.name) is not None for job in active)
    if active and all(seconds is None for seconds in left.values()):
        return Estimate(left, None, is_whole)
    seconds = {job.name: left.get(job.name) or 0.0 for job in active}
    running = [job.name for job in active if statuses[job.name].state == "running"]
    return Estimate(left, makespan(seconds, {job.name: job.needs for job in active}, running, at_once), is_whole)


def makespan(seconds: Mapping[str, float], needs: Mapping[str, Sequence[str]], running: Sequence[str], at_once: int) -> float:
    """Seconds until all jobs are done, if each starts as soon as there is room, in their order, and what it needs is done.

    seconds: what is left of each job. A need that is not among them is done.
    """
    ends = {name: seconds[name] for name in running}
    waiting = [name for name in seconds if name not in ends]
    clock, pending = 0.0, set(seconds)
    while ends or waiting:
        for name in [name for name in waiting if not pending.intersection(needs[name])]:
            if len(ends) >= at_once:
                break
            ends[name] = clock + seconds[name]
            waiting.remove(name)
        if not ends:  # the rest needs what can never be done
            break
        first = min(ends, key=lambda name: ends[name])
        clock = ends.pop(first)
        pending.remove(first)
    return clock


def _pace(job: Job, jobs: Sequence[Job], statuses: Mapping[str, Status], progress: Mapping[str, Progress]) -> float | None:
    own = progress[job.name]
    if statuses[job.name].state == "running" and own.pace is not None:
        return own.pace
    trainings = [other for other in jobs if other.steps and progress[other.name].step]
    runs = [other for other in trainings if other.kind == job.kind]
    arm = [other for other in runs if job.arm and other.arm == job.arm]
    for others in (arm, runs, trainings):
        total = sum(progress[other.name].step for other in others)
        if total:
            return sum(progress[other.name].seconds for other in others) / total
    return None

"""The states of a study's jobs, and which jobs may start. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_salt.errors import UserError, did_you_mean
from megatron_salt.study.job import Job
from megatron_salt.study.jobs.outcome import Outcome

State = Literal["waiting", "queued", "running", "done", "left", "failed", "not run"]
ENDED = ("done", "left", "failed", "not run")
"""States in which this start of the study does nothing more for a job"""


@dataclass(frozen=True)
class Status:
    """One job, as the study sees it."""

    state: State
    reason: str = ""
    """Why it failed, left, or is not run: one line"""


WAITING, QUEUED, RUNNING = Status("waiting"), Status("queued"), Status("running")


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise UserError where names or directories repeat, a job needs one that does not stand before it, or steps are missing."""
    before: dict[str, Job] = {}
    directories: dict[str, str] = {}
    for job in jobs:
        if job.name in before:
            raise UserError(f"two jobs of the study have the name {job.name}")
        other = directories.setdefault(str(job.directory), job.name)
        if other != job.name:
            raise UserError(f"jobs {other} and {job.name} of the study both write into {job.directory}")
        for need in job.needs:
            if need not in before:
                raise UserError(f"job {job.name} needs {need}, which does not stand before it{did_you_mean(need, before)}")
        before[job.name] = job


def status_after(outcome: Outcome | None) -> Status:
    """The status of a job that has ended with this outcome; None: it wrote nothing, or what it wrote cannot be read."""
    if outcome is None:
        return Status("failed", "it ended without a word")
    if outcome.word == "done":
        return Status("done")
    if outcome.word == "left":
        return Status("left", outcome.reason)
    return Status("failed", f"{outcome.word}: {outcome.reason}")


def status_at_start(outcome: Outcome | None) -> Status:
    """The status of a job before this start of the study does anything.

    done stays done. Numbers that are not finite would only come again, so `nonfinite` stays failed. Whatever else ended early starts again:
    the user may have mended the cause, and what the job has saved is not lost.
    """
    if outcome is not None and outcome.word in ("done", "nonfinite"):
        return status_after(outcome)
    return WAITING


def ready(jobs: Sequence[Job], statuses: Mapping[str, Status], steps: Mapping[str, int]) -> list[Job]:
    """The waiting jobs whose needs are done, and that need not wait for a --teacher-cache, in the study's order.

    steps: {name: last step in its log} of trainings; 0 where there is none.
    """
    return [
        job
        for job in jobs
        if statuses[job.name].state == "waiting"
        and all(statuses[need].state == "done" for need in job.needs)
        and not fills_first(job, jobs, statuses, steps)
    ]


def fills_first(job: Job, jobs: Sequence[Job], statuses: Mapping[str, Status], steps: Mapping[str, int]) -> list[str]:
    """Names of jobs that put into a --teacher-cache what a job will read from it, and have not done it yet.

    Runs that draw the same samples would each compute them all if they began together. So for each length of stage 1 one of them goes
    first, and the others wait until its stage 1 is over. Where it fails before that, the next one goes first. No two jobs wait for each
    other: nobody waits for a longer stage 1 than its own.
    """
    if job.cached is None:
        return []
    group = [(one, one.cached.steps) for one in jobs if one.cached is not None and one.cached.order == job.cached.order]
    filled = max(
        (length for one, length in group if statuses[one.name].state == "done" or steps.get(one.name, 0) > length), default=0
    )
    first: dict[int, str] = {}
    for one, length in group:
        if filled < length <= job.cached.steps and statuses[one.name].state not in ENDED:
            first.setdefault(length, one.name)
    return [name for length, name in first.items() if name != job.name]


def blocked(jobs: Sequence[Job], statuses: Mapping[str, Status]) -> dict[str, Status]:
    """{name: status} of waiting jobs that can no longer start, because a job that they need failed, left or is not run itself."""
    found = dict(statuses)
    for job in jobs:  # needs stand before
        lost = [need for need in job.needs if found[need].state in ("failed", "left", "not run")]
        if found[job.name].state == "waiting" and lost:
            found[job.name] = Status("not run", f"needs {', '.join(lost)}")
    return {name: status for name, status in found.items() if status != statuses[name]}


def failed_needs(jobs: Sequence[Job], outcomes: Mapping[str, Outcome | None]) -> dict[str, str]:
    """{name: "teacher failed, nonfinite: ..."} of jobs that cannot start, because a job that they need has failed in an earlier start."""
    failed: dict[str, str] = {}
    causes: dict[str, str] = {}
    for job in jobs:  # needs stand before
        outcome = outcomes[job.name]
        status = WAITING if outcome is None else status_after(outcome)
        cause = next((cause for need in job.needs if (cause := failed.get(need) or causes.get(need))), None)
        if status.state == "failed":
            failed[job.name] = f"{job.name} failed, {status.reason}"
        elif status.state == "waiting" and cause is not None:
            causes[job.name] = cause
    return causes

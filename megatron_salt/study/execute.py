"""Runs the jobs of a study, here or on Slurm, and shows how far they are. What is done is not done again.

A job starts when all that it needs is done. One that fails does not stop the others; what needs it is not run. Ctrl-C and SIGTERM let
every run save and leave: the same command goes on from there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from megatron_salt.files import sole_writer
from megatron_salt.study.job import Job, SlurmOptions
from megatron_salt.study.jobs.estimate import estimate
from megatron_salt.study.jobs.live_table import Display, View
from megatron_salt.study.jobs.local import LocalJobs
from megatron_salt.study.jobs.outcome import read_outcome
from megatron_salt.study.jobs.progress import Progress, ProgressReader
from megatron_salt.study.jobs.slurm import SlurmJobs
from megatron_salt.study.jobs.status import ENDED, RUNNING, Status, blocked, check_jobs, ready, status_after, status_at_start

POLL_SECONDS = 0.5
SLURM_POLL_SECONDS = 10.0
SHOW_SECONDS = 1.0
STOPPED = Status("left", "stopped before it began")
KILLED = Status("left", "killed before it could save; it goes on from its last checkpoint")
LEAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Watched:
    """The jobs of a study and what is known of them. Invariant: every job has one status."""

    def __init__(self, jobs: Sequence[Job], statuses: dict[str, Status], at_once: int, display: Display) -> None:
        self.jobs, self.statuses, self._at_once, self._display = jobs, statuses, at_once, display
        self._readers = {job.name: ProgressReader(job.directory / "train.jsonl") for job in jobs if job.steps}
        self._idle = {job.name: Progress() for job in jobs}
        self._shown = -SHOW_SECONDS

    def progress(self) -> dict[str, Progress]:
        """How far each job is."""
        return self._idle | {name: reader.read() for name, reader in self._readers.items()}

    def view(self) -> View:
        """What can be shown now."""
        progress = self.progress()
        return View(self.jobs, dict(self.statuses), progress, estimate(self.jobs, self.statuses, progress, self._at_once))

    def show(self) -> None:
        """Show it, at most once a second."""
        if time.monotonic() - self._shown >= SHOW_SECONDS:
            self._display.show(self.view())
            self._shown = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do."""
        return all(status.state in ENDED for status in self.statuses.values())


def run_jobs(
    jobs: Sequence[Job], study_dir: Path, local: int, *, slurm: SlurmOptions | None = None, out: TextIO | None = None
) -> int:
    """Run what is not done yet. Returns 0 where all jobs are done, 1 where some are not, 128 + signal where it was told to leave.

    jobs: what a job needs stands before it. local: jobs at a time on this machine. slurm: submit them there instead; `local` does not
    matter then. out: where to show progress, default stdout. Raises UserError where another process does this study, or jobs contradict
    each other. Main thread only.
    """
    check_jobs(jobs)
    study_dir.mkdir(parents=True, exist_ok=True)
    with sole_writer("output", study_dir), _signals() as asked, Display(out) as display:
        statuses = {job.name: status_at_start(read_outcome(job.outcome)) for job in jobs}
        watched = _Watched(jobs, statuses, local if slurm is None else max(1, len(jobs)), display)
        if slurm is None:
            _run_here(watched, LocalJobs(local), asked)
        else:
            _run_on_slurm(watched, SlurmJobs(slurm, study_dir), asked)
        display.end(watched.view(), _note(bool(asked), slurm is not None))
    if asked:
        return 128 + asked[0]
    return 0 if all(status.state == "done" for status in statuses.values()) else 1


def _note(told_to_leave: bool, on_slurm: bool) -> str:
    if not told_to_leave:
        return ""
    if on_slurm:
        return "the jobs stay in Slurm's queue: the same command looks at them again, scancel ends them"
    return "told to leave: the same command goes on from what is saved"


def _run_here(watched: _Watched, running: LocalJobs, asked: Sequence[int]) -> None:
    jobs, statuses = watched.jobs, watched.statuses
    has_told = False
    try:
        while True:
            for job in running.ended():
                outcome = read_outcome(job.outcome)
                statuses[job.name] = STOPPED if outcome is None and asked else status_after(outcome)
            if asked and not has_told:
                running.ask_to_leave()
                has_told = True
            if len(asked) > 1:  # somebody presses Ctrl-C again
                break
            if not asked:
                statuses |= blocked(jobs, statuses)
                steps = {name: one.step for name, one in watched.progress().items()} if running.has_room else {}
                for job in ready(jobs, statuses, steps):
                    if not running.has_room:
                        break
                    statuses[job.name] = _start(running, job)
            watched.show()
            if watched.is_over or (asked and all(status.state != "running" for status in statuses.values())):
                return
            time.sleep(POLL_SECONDS)
    finally:
        running.kill()
        statuses |= {job.name: KILLED for job in jobs if statuses[job.name].state == "running"}


def _start(running: LocalJobs, job: Job) -> Status:
    """Start a job. One that cannot be started, as on a full disk, has failed; those that run go on."""
    try:
        running.start(job)
    except OSError as error:
        return Status("failed", f"it cannot be started: {error}")
    return RUNNING


def _run_on_slurm(watched: _Watched, queue: SlurmJobs, asked: Sequence[int]) -> None:
    """Submit, then look until all is over. A signal only ends the looking: the jobs stay in the queue."""
    jobs, statuses = watched.jobs, watched.statuses
    statuses |= blocked(jobs, statuses)
    statuses |= queue.submit(jobs, statuses)
    while not watched.is_over and not asked:
        statuses |= queue.look(jobs, statuses)
        statuses |= blocked(jobs, statuses)
        watched.show()
        _sleep(SLURM_POLL_SECONDS, lambda: bool(asked) or watched.is_over)


def _sleep(seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        time.sleep(0.2)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to leave that have come so far, instead of their usual effect."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    heeded = [number for number in LEAVE_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""What a study shows while it works: a table on a terminal, else one line a minute and one at each change."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_salt.study.job import Job
from megatron_salt.study.jobs.estimate import Estimate
from megatron_salt.study.jobs.progress import Progress
from megatron_salt.study.jobs.status import Status

LINE_SECONDS = 60.0
"""Without a terminal: seconds between two lines about work that goes on"""
_STYLES = {"running": "cyan", "done": "green", "failed": "red", "not run": "red", "left": "yellow"}
_ORDER = ("running", "failed", "not run", "left", "queued", "waiting", "done")
"""On a terminal that is too low for all jobs, the last ones are not shown"""
_COLUMNS = ("job", "seed", "state", "step", "held-out", "s a step", "left")


@dataclass(frozen=True)
class View:
    """Everything that is shown about a study at one time."""

    jobs: Sequence[Job]
    statuses: Mapping[str, Status]
    progress: Mapping[str, Progress]
    estimate: Estimate

    def row(self, job: Job) -> tuple[str, ...]:
        """The cells of one job, see `_COLUMNS`: a run is named by its arm and seed."""
        status, progress = self.statuses[job.name], self.progress[job.name]
        left = self.estimate.jobs.get(job.name)
        return (
            job.arm or job.name,
            "" if job.seed is None else str(job.seed),
            status.state,
            f"{progress.step}/{job.steps}" if job.steps else "",
            "" if progress.held_out is None else f"{progress.held_out:.4f}",
            "" if progress.step_seconds is None else f"{progress.step_seconds:.3g}",
            clock_time(left) if left is not None and status.state == "running" else "",
        )

    @property
    def summary(self) -> str:
        """Counts of jobs by state, and the time left, in one line."""
        counts = Counter[str](status.state for status in self.statuses.values())
        parts = [f"{counts['done']} of {len(self.jobs)} jobs done"]
        parts += [f"{counts[state]} {state}" for state in _ORDER if state != "done" and counts[state]]
        if self.estimate.study is not None and counts["running"] + counts["waiting"] + counts["queued"]:
            about = "about" if self.estimate.is_whole else "more than"
            parts.append(f"{about} {clock_time(self.estimate.study)} left")
        return ", ".join(parts)

    @property
    def reasons(self) -> list[str]:
        """A line for each job that failed, left, or is not run."""
        told = [(job.name, self.statuses[job.name]) for job in self.jobs if self.statuses[job.name].reason]
        return [f"{name}: {status.state}: {status.reason}" for name, status in told]

    def table(self) -> Table:
        """All jobs: those at work first, then those that failed."""
        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in _COLUMNS:
            right = name in ("seed", "step", "held-out", "s a step", "left")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for job in sorted(self.jobs, key=lambda job: _ORDER.index(self.statuses[job.name].state)):
            table.add_row(*map(Text, self.row(job)), style=_STYLES.get(self.statuses[job.name].state, ""))
        return table


def _unread() -> contextlib.suppress:
    """Pass over output that cannot be written. rich raises SystemExit for a pipe that nobody reads."""
    return contextlib.suppress(OSError, SystemExit)


class Display:
    """Shows views. `with Display() as display: display.show(view)`, as often as one likes.

    A terminal that is closed, a pipe that nobody reads and a full disk hide views; they are no error, because jobs are at work.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """out: default stdout; a terminal gets a table."""
        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=not (out or sys.stdout).isatty())
        self._clock = clock
        self._live: Live | None = None
        self._shown: dict[str, Status] = {}
        self._last_line = -math.inf

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            with _unread():
                self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            with _unread():
                self._live.stop()

    def show(self, view: View) -> None:
        """Draw the table anew, or print a line for each change and once a minute one for the rest."""
        with _unread():
            self._draw(view)

    def _draw(self, view: View) -> None:
        if self._live is not None:
            self._live.update(Group(*map(Text, [view.summary, *view.reasons]), view.table()), refresh=True)
            return
        changed = [job for job in view.jobs if self._shown.get(job.name) != view.statuses[job.name]]
        first = not self._shown
        self._shown = dict(view.statuses)
        if not first:
            for job in changed:
                self._print(_change(view, job))
        if first or self._clock() - self._last_line >= LINE_SECONDS:
            self._last_line = self._clock()
            self._print("; ".join([view.summary, *(_at_work(view, job) for job in view.jobs if _is_training(view, job))]))

    def end(self, view: View, note: str) -> None:
        """The last view: without a terminal, its summary and what is not done. note: what the user may do now; may be empty."""
        self.show(view)
        if self._live is None:
            self._print(view.summary)
            for line in view.reasons:
                self._print(line)
        if note:
            self._print(note)

    def _print(self, line: str) -> None:
        with _unread():
            self._console.print(Text(f"{time.strftime('%T')} | {line}"))
            self._console.file.flush()


def clock_time(seconds: float) -> str:
    """A duration as "2h05m", "3m20s" or "45s"."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _is_training(view: View, job: Job) -> bool:
    return view.statuses[job.name].state == "running" and view.progress[job.name].step > 0


def _change(view: View, job: Job) -> str:
    status, progress = view.statuses[job.name], view.progress[job.name]
    words = f"{job.name}: {status.state}"
    if status.reason:
        words += f": {status.reason}"
    if job.steps and progress.step:
        words += f", step {progress.step}/{job.steps}"
    if status.state == "done" and progress.held_out is not None:
        words += f", held-out loss {progress.held_out:.4f}"
    return words


def _at_work(view: View, job: Job) -> str:
    progress, left = view.progress[job.name], view.estimate.jobs.get(job.name)
    words = [f"{job.name} step {progress.step}/{job.steps}"]
    words += [] if progress.held_out is None else [f"held-out loss {progress.held_out:.4f}"]
    words += [] if progress.step_seconds is None else [f"{progress.step_seconds:.3g} s a step"]
    words += [] if left is None else [f"{clock_time(left)} left"]
    return ", ".join(words)

"""Stages of a first run: each in a try of its own, with a time limit; a JSON line each, and a table at the end.

results.jsonl gets a line when a stage starts and one when it ends, on the disk before the next begins. So nothing is lost if the process is
killed. Where a stage hangs, or leaves a GPU that no longer answers, the process replaces itself by a new one that goes on after that stage.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "failed", "not here", "no time", "hung", "started"]
RESULTS, TABLE, STACKS = "results.jsonl", "table.md", "stacks.txt"
GRACE = 30.0
"""Seconds after a stage's limit in which it may still end by itself."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the stages run."""

    device: Literal["cuda", "cpu"]
    tiny: bool
    """Small shapes: they show that a stage runs, and measure nothing."""
    scratch: Path
    """A folder for data and checkpoints, removed at the end."""
    timed: bool
    """Whether times and memory mean something: on a GPU that is one."""

    @property
    def patience(self) -> float:
        """What a limit in seconds, which is for a GPU, is multiplied with: a CPU may be busy with other work."""
        return 1 if self.timed else 10


class NotHereError(Exception):
    """What a stage needs is not on this machine; the message says what."""


class OutOfTimeError(Exception):
    """A stage has used up its time."""


@dataclass
class Report:
    """What one stage found: figures by name, and what is wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, **figures: Any) -> None:
        """Keep figures: numbers, words, lists, or rows (a list of dicts)."""
        self.figures |= figures

    def require(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)

    def compare(
        self, name: str, found: Sequence[float], expected: Sequence[float], relative: float, absolute: float = 0.0
    ) -> None:
        """Keep the largest relative difference of two lists of numbers; a problem where one is above its tolerance."""
        if len(found) != len(expected):
            self.problems.append(f"{name}: {len(found)} numbers where {len(expected)} are expected")
            return
        pairs = list(zip(found, expected, strict=True))
        worst = max((abs(one - other) / max(abs(other), 1e-12) for one, other in pairs), default=0.0)
        self.figures.setdefault("comparisons", []).append(
            {"what": name, "largest relative difference": worst, "tolerance": relative}
        )
        bad = [(one, other) for one, other in pairs if not abs(one - other) <= max(relative * abs(other), absolute)]
        if bad:
            one, other = bad[0]
            self.problems.append(
                f"{name}: {one!r} where {other!r} is expected (tolerance {relative:g}); {len(bad)} of {len(pairs)} numbers are off"
            )


@dataclass(frozen=True)
class Stage:
    """One part of a first run."""

    name: str
    seconds: float
    """It is left out where fewer are left, and stopped after as many."""
    run: Callable[[Setting, Report], None]


@dataclass(frozen=True)
class Outcome:
    """A line of results.jsonl."""

    stage: str
    status: Status
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    trace: str = ""


class Runner:
    """Runs stages one after another, and keeps results.jsonl."""

    def __init__(
        self, setting: Setting, out: Path, deadline: float, restart: Callable[[str], None] | None = None, grace: float = GRACE
    ):
        """deadline: time.time() at which all must be done. restart: replaces the process by one that goes on after the named stage."""
        self._setting, self._out, self._deadline, self._restart, self._grace = setting, out, deadline, restart, grace

    def run(self, stages: Sequence[Stage], clean_up: Callable[[], None] = gc.collect) -> None:
        """Run them all. clean_up: called after each; where it raises, the process starts anew."""
        for stage in stages:
            left = self._deadline - time.time()
            if left < stage.seconds:
                self._write(
                    Outcome(stage.name, "no time", problems=[f"{left:.0f} s are left, and it may take {stage.seconds:.0f}"])
                )
                continue
            self._write(Outcome(stage.name, "started"))
            with self._watched(stage):
                outcome = self._attempt(stage)
            self._write(outcome)
            try:
                clean_up()
            except Exception as error:
                self._write(Outcome(f"after {stage.name}", "failed", problems=[f"the process cannot go on: {_line(error)}"]))
                if self._restart is None:
                    raise
                self._restart(stage.name)

    def _attempt(self, stage: Stage) -> Outcome:
        report, trace, status = Report(), "", "ok"
        start = time.perf_counter()
        try:
            with _alarm(stage.seconds * self._setting.patience):
                stage.run(self._setting, report)
        except NotHereError as reason:
            status = "not here"
            report.problems.append(str(reason))
        except (Exception, SystemExit) as error:
            status, trace = "failed", traceback.format_exc(limit=-12)
            report.problems.append(_line(error))
        if report.problems and status == "ok":
            status = "failed"
        return Outcome(stage.name, status, time.perf_counter() - start, report.figures, report.problems, trace)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _watched(self, stage: Stage) -> Iterator[None]:
        """A thread that ends the process, or restarts it, where the stage does not even end after its alarm."""

        limit = stage.seconds * self._setting.patience + self._grace

        def hung() -> None:
            with open(self._out / STACKS, "a") as file:
                file.write(f"== {stage.name}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._write(Outcome(stage.name, "hung", limit, problems=[f"no end after {limit:.0f} s; {STACKS} has its stack"]))
            if self._restart is not None:
                self._restart(stage.name)
            write_table(self._out)
            os._exit(1)

        timer = threading.Timer(limit, hung)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _write(self, outcome: Outcome) -> None:
        with open(self._out / RESULTS, "a") as file:
            file.write(json.dumps(_finite(asdict(outcome))) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if outcome.status != "started":
            what = "; ".join(outcome.problems)[:300]
            print(f"{outcome.status:9} {outcome.seconds:6.1f} s  {outcome.stage}{': ' + what if what else ''}", flush=True)


def read_outcomes(out: Path) -> list[Outcome]:
    """The last line of each stage, in the order in which they began. A stage that only started is one in which the process ended."""
    found: dict[str, Outcome] = {}
    for line in (out / RESULTS).read_text().splitlines():
        outcome = Outcome(**json.loads(line))
        found[outcome.stage] = outcome
    return list(found.values())


def write_table(out: Path) -> bool:
    """Write the Markdown table of all results. Returns whether nothing failed."""
    outcomes = read_outcomes(out)
    lines = ["| stage | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {one.stage} | {one.status} | {one.seconds:.1f} | {_cell('; '.join(one.problems))} |" for one in outcomes]
    for one in outcomes:
        if one.figures:
            lines += ["", f"## {one.stage}", ""]
            plain = {name: value for name, value in one.figures.items() if not _is_rows(value)}
            if plain:
                lines += ["| figure | value |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in plain.items())]
            for name, rows in one.figures.items():
                if _is_rows(rows):
                    columns = list(dict.fromkeys(column for row in rows for column in row))
                    lines += ["", f"{name}:", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
                    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    (out / TABLE).write_text("# First run\n\n" + "\n".join(lines) + "\n")
    return all(one.status in ("ok", "not here", "no time") for one in outcomes)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _line(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the main thread after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTimeError(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

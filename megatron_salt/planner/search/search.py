"""The fastest layouts that fit: all are timed, and those that may be among the fastest are traced. Pure.

Layouts that differ in pipeline stages, chunks or full recomputation alone share their traces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_salt.config import ParallelConfig, RunConfig
from megatron_salt.planner.compose import compose, held_bytes
from megatron_salt.planner.memory import GIB, HostMemory, PlannedMemory
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.time.machine import Machine
from megatron_salt.planner.time.roofline import step_time
from megatron_salt.planner.trace import ChunkTrace, StudentRequest, TeacherRequest, Traces, TraceSetting, TraceTask, alone

BEST = 10
"""Layouts that a search shows."""
AT_A_TIME = 50
"""Layouts whose traces are asked for together."""
NO_HOST = HostMemory(staged=0, gathered=0)
TraceTasks = Callable[[Sequence[TraceTask]], Iterable[Traces]]
"""Traces tasks, in their order"""


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """A layout and its estimated times."""

    run: PlannedRun
    stage1: tuple[tuple[int, float], ...]
    """(steps, seconds of a step) of the parts of stage 1, see `PlannedRun.stage1_parts`; none without a teacher"""
    stage2: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        taught = sum(steps for steps, _ in self.stage1)
        return sum(steps * seconds for steps, seconds in self.stage1) + (self.run.plan.total_steps - taught) * self.stage2


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout that fits."""

    timed: TimedRun
    memory: PlannedMemory


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: tuple[Found, ...]
    """At most BEST layouts that fit, the fastest first. Of those that differ in recomputation and in layers of the last stage alone there
    is the fastest"""
    fit: int
    """Layouts that fit"""
    too_large: tuple[tuple[str, int, float], ...]
    """(why, layouts, GiB of the smallest of them) of those that do not fit"""
    refused: tuple[tuple[str, int], ...]
    """(message of the trainer, layouts) of those that it refuses. Each message stands for all that differ in numbers"""
    slower: int
    """Layouts that were timed alone, because all of the others are faster"""


class TraceShare:
    """Traces by what they depend on."""

    def __init__(self, trace: TraceTasks) -> None:
        self._trace = trace
        self._student: dict[tuple[TraceSetting, StudentRequest], ChunkTrace] = {}
        self._teacher: dict[tuple[TraceSetting, TeacherRequest], ChunkTrace] = {}

    def fill(self, runs: Sequence[PlannedRun]) -> None:
        """Trace what the runs need and no run before them needed."""
        students: dict[TraceSetting, dict[StudentRequest, None]] = {}
        teachers: dict[tuple[TraceSetting, TeacherRequest], None] = {}
        for run in runs:
            task = run.trace_task()
            setting = _shared(task.setting)
            for request in task.student:
                if (setting, request) not in self._student:
                    students.setdefault(setting, {})[request] = None
            if task.teacher is not None and (_of_teacher(setting), task.teacher) not in self._teacher:
                teachers[_of_teacher(setting), task.teacher] = None
        if not runs:
            return
        device = runs[0].device
        tasks = [TraceTask(setting=one, device=device, student=tuple(asked), teacher=None) for one, asked in students.items()]
        tasks += [TraceTask(setting=one, device=device, student=(), teacher=request) for one, request in teachers]
        for task, traces in zip(tasks, self._trace(tasks), strict=True):
            for request, found in traces.student.items():
                self._student[task.setting, request] = found
            if task.teacher is not None and traces.teacher is not None:
                self._teacher[task.setting, task.teacher] = traces.teacher

    def of(self, run: PlannedRun) -> Traces:
        """The traces of a run, which `fill` has had."""
        task = run.trace_task()
        setting = _shared(task.setting)
        return Traces(
            student={request: self._student[setting, request] for request in task.student},
            teacher=None if task.teacher is None else self._teacher[_of_teacher(setting), task.teacher],
        )


def search(
    runs: Sequence[PlannedRun],
    refused: Sequence[str],
    *,
    machine_of: Callable[[PlannedRun], Machine],
    usable: float,
    most: int,
    trace: TraceTasks,
) -> SearchResult:
    """The fastest of `runs` whose memory is at most `usable` GiB. refused: messages of the trainer about other layouts.

    The `most` fastest layouts are traced, and more where fewer than BEST of these fit.
    """
    shown: list[RunConfig] = []
    order = sorted((_timed(run, machine_of(run)) for run in runs), key=lambda timed: timed.seconds)
    share, found, fit, done = TraceShare(trace), list[Found](), 0, 0
    causes: Counter[str] = Counter()
    smallest: dict[str, float] = {}
    while done < len(order) and (done < most or len(found) < BEST):
        batch = order[done : done + min(AT_A_TIME, max(most - done, BEST))]
        done += len(batch)
        held = {id(timed): held_bytes(timed.run) / GIB for timed in batch}
        share.fill([timed.run for timed in batch if held[id(timed)] <= usable])
        for timed in batch:
            if held[id(timed)] > usable:
                cause, gib = "weights, gradients and optimizer state alone are too large", held[id(timed)]
            else:
                memory = compose(timed.run, share.of(timed.run), NO_HOST)
                if memory.most / GIB <= usable:
                    fit += 1
                    layout = _without_variants(timed.run.config)
                    if layout not in shown:
                        shown.append(layout)
                        found.append(Found(timed=timed, memory=memory))
                    continue
                cause, gib = _largest(memory), memory.most / GIB
            causes[cause] += 1
            smallest[cause] = min(gib, smallest.get(cause, gib))
    return SearchResult(
        best=tuple(found[:BEST]), fit=fit, slower=len(order) - done, refused=_grouped(refused),
        too_large=tuple((cause, count, smallest[cause]) for cause, count in causes.most_common()),
    )  # fmt: skip


def _timed(run: PlannedRun, machine: Machine) -> TimedRun:
    stage1 = tuple((steps, step_time(part, machine, taught=True).total) for steps, part in run.stage1_parts())
    return TimedRun(run=run, stage1=stage1, stage2=step_time(run, machine, taught=False).total)


def _without_variants(config: RunConfig) -> RunConfig:
    """A layout whose name several amounts of recomputation and of layers in the last stage share."""
    parallel = replace(
        config.parallel, recompute_granularity=None, recompute_method=None, recompute_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )  # fmt: skip
    return replace(config, parallel=parallel)


def _shared(setting: TraceSetting) -> TraceSetting:
    """A setting without what no trace depends on."""
    return replace(setting, parallel=alone(setting.parallel))


def _of_teacher(setting: TraceSetting) -> TraceSetting:
    """The same for a trace of the teacher, which has its own layout."""
    return replace(setting, parallel=ParallelConfig(), chunk_tokens=1)


def _largest(memory: PlannedMemory) -> str:
    """The kind that takes most at the highest peak."""
    rank = max(memory.stages, key=lambda rank: rank.most)
    moment = rank.stage1 if rank.stage1 is not None and rank.stage1.total == rank.most else rank.stage2
    return f"most of it: {max(moment.bytes, key=lambda kind: moment.bytes[kind])}"


def _grouped(messages: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """(first of the messages that differ in numbers alone, how many there are), the most first."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for message in messages:
        key = re.sub(r"[\d.]+", "", message)
        first.setdefault(key, message)
        count[key] += 1
    return tuple((first[key], number) for key, number in count.most_common())

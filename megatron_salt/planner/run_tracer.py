"""Starts the child process that traces, and takes what it found. The process that calls is not changed: every shim is in the child."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from megatron_salt.child_processes import end_at_interrupt, end_with_parent, holding_interrupts
from megatron_salt.parallel.hardware import VISIBLE
from megatron_salt.planner.memory import HostMemory
from megatron_salt.planner.planned_run import PlannedRun, RunFlags
from megatron_salt.planner.trace import Traces, TraceTask

T = TypeVar("T")
A = TypeVar("A")


def read_and_trace(flags: RunFlags) -> tuple[PlannedRun, Traces, HostMemory]:
    """What the flags name, the traces of the run's parts, and the host memory of its saves. Raises UserError.

    It takes seconds, most of them for the imports of torch and megatron-core.
    """
    return in_child(_read_and_trace, flags)


def trace_whole_steps(run: PlannedRun, steps: Sequence[tuple[int, bool]]) -> Iterator[int]:
    """The peak bytes of steps on ranks of the first block, on fake tensors; each as soon as it is known.

    steps: (place, whether it is a step of stage 1)."""
    with children(1) as pool:
        yield from pool.map(_trace_whole_step, [(run, place, taught) for place, taught in steps])


@contextlib.contextmanager
def children(count: int) -> Iterator[Executor]:
    """Processes that trace side by side. They end with the block."""
    with ProcessPoolExecutor(count, get_context("spawn"), prepare) as pool:
        yield pool


def read_candidates(candidates: Sequence[RunFlags]) -> list[PlannedRun | str]:
    """In a child: see `read_run.read_runs`."""
    from megatron_salt.planner.read_run import read_runs  # torch and megatron-core, and the patches of the seam

    return read_runs(candidates)


def trace(task: TraceTask) -> Traces:
    """In a child: all traces of a task."""
    from megatron_salt.planner.tracing.tracer import trace_all  # torch and megatron-core, and the patches of the seam

    return trace_all(task)


def in_child(function: Callable[[T], A], task: T) -> A:
    """`function(task)` in a process of its own, which sees no GPU and compiles nothing. Both are pickled."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare) as pool:
        with holding_interrupts():
            future = pool.submit(function, task)
        return future.result()


def prepare() -> None:
    """What the child does before torch is imported."""
    end_with_parent()
    end_at_interrupt()
    os.environ.update({VISIBLE: "", "TORCHDYNAMO_DISABLE": "1"})
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.simplefilter("ignore")


def _read_and_trace(flags: RunFlags) -> tuple[PlannedRun, Traces, HostMemory]:
    from megatron_salt.planner.read_run import host_memory, read_run  # torch and megatron-core, and the patches of the seam
    from megatron_salt.planner.tracing.tracer import trace_all

    run = read_run(flags)
    return run, trace_all(run.trace_task()), host_memory(run)


def _trace_whole_step(task: tuple[PlannedRun, int, bool]) -> int:
    from megatron_salt.planner.tracing.whole_step import WholeStep, trace_step  # torch and megatron-core

    run, place, taught = task
    return trace_step(WholeStep(run=run, place=place, taught=taught))

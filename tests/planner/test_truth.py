"""The composed figures against a whole step: on fake tensors within 3%, and on CPU ranks within 10%.

This checks the tracer and the composition. Both sides run on a CPU: what a GPU allocates is unmeasured.
"""

from __future__ import annotations

import pytest

from megatron_salt.planner.compose import compose
from megatron_salt.planner.memory import HostMemory, PlannedMemory
from megatron_salt.planner.run_tracer import in_child
from tests.planner.runs import QUICK, RUNS
from tests.support.ranks import run_ranks

Peaks = dict[tuple[str, int, bool], int]
"""{(run, pipeline stage, whether in stage 1): bytes}"""

each_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full, pytest.mark.long]) for name in RUNS]
)


def compose_and_trace(names: tuple[str, ...]) -> tuple[dict[str, PlannedMemory], Peaks]:
    """In a child process: the composed memory of runs, and the peaks of their whole steps on fake tensors."""
    from megatron_salt.planner.tracer import trace_all
    from megatron_salt.planner.whole_step import WholeStep, trace_step

    composed, whole = {}, {}
    for name in names:
        run = RUNS[name]
        composed[name] = compose(run, trace_all(run.trace_task()), HostMemory(staged=0, gathered=0))
        for rank in composed[name].stages:
            for taught in (False, True)[: 1 + (run.teacher is not None)]:
                whole[name, rank.pipeline_stage, taught] = trace_step(WholeStep(run=run, place=rank.place, taught=taught))
    return composed, whole


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest) -> tuple[dict[str, PlannedMemory], Peaks]:
    """What a child process finds for all runs of the chosen tests."""
    chosen = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    return in_child(compose_and_trace, tuple(name for name in RUNS if name in chosen))


def peaks_of(memory: PlannedMemory, name: str) -> Peaks:
    """The composed peaks of a run."""
    found = {}
    for rank in memory.stages:
        found[name, rank.pipeline_stage, False] = rank.stage2.total
        if rank.stage1 is not None:
            found[name, rank.pipeline_stage, True] = rank.stage1.total
    return found


@each_run
def test_the_composed_peak_is_that_of_a_whole_step(name, traced):
    composed, whole = traced
    expected = {key: peak for key, peak in whole.items() if key[0] == name}
    assert peaks_of(composed[name], name) == pytest.approx(expected, rel=0.03)


@each_run
def test_cpu_ranks_hold_what_was_composed(name, traced):
    run, memory = RUNS[name], traced[0][name]
    measured: Peaks = {}
    for taught in (False, True)[: 1 + (run.teacher is not None)]:
        for rank, peak in enumerate(run_ranks(run.layout.world_size, measure, name, taught)):
            key = name, run.layout.coordinates(rank).pp, taught
            measured[key] = max(measured.get(key, 0), peak)
    assert peaks_of(memory, name) == pytest.approx(measured, rel=0.1)


def measure(name: str, taught: bool) -> int:
    """In a rank: the most bytes of tensors that are alive in a step."""
    from megatron_salt.planner.whole_step import peak_of_step

    return peak_of_step(RUNS[name], taught)

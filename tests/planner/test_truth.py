"""The composed figures against a whole step: on fake tensors within 3%, and on CPU ranks within 10%.

This checks the tracer and the composition. Both sides run on a CPU: what a GPU allocates is unmeasured.
"""

from __future__ import annotations

import pytest

from megatron_salt.planner.compose import compose
from megatron_salt.planner.memory import HostMemory, PlannedMemory
from megatron_salt.planner.run_tracer import in_child
from tests.planner.runs import GPU_FORMS, QUICK, RUNS
from tests.support.ranks import run_ranks

Peaks = dict[tuple[int, bool], int]
"""{(pipeline stage, whether in stage 1): bytes}"""


def compose_and_trace(name: str) -> tuple[PlannedMemory, Peaks]:
    """In a child process: the composed memory of a run, and the peaks of its whole steps on fake tensors."""
    from megatron_salt.planner.tracing.tracer import trace_all
    from megatron_salt.planner.tracing.whole_step import WholeStep, trace_step

    run, whole = (RUNS | GPU_FORMS)[name], {}
    composed = compose(run, trace_all(run.trace_task()), HostMemory(staged=0, gathered=0))
    for rank in composed.stages:
        for taught in (False, True)[: 1 + (run.teacher is not None)]:
            whole[rank.pipeline_stage, taught] = trace_step(WholeStep(run=run, place=rank.place, taught=taught))
    return composed, whole


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full, pytest.mark.long]) for name in RUNS],
)
def traced(request: pytest.FixtureRequest) -> tuple[str, PlannedMemory, Peaks]:
    """The name of a run, and what a child process finds."""
    return request.param, *in_child(compose_and_trace, request.param)


def peaks_of(memory: PlannedMemory) -> Peaks:
    """The composed peaks of a run."""
    found = {(rank.pipeline_stage, False): rank.stage2.total for rank in memory.stages}
    return found | {(rank.pipeline_stage, True): rank.stage1.total for rank in memory.stages if rank.stage1 is not None}


def test_the_composed_peak_is_that_of_a_whole_step(traced):
    _, composed, whole = traced
    assert peaks_of(composed) == pytest.approx(whole, rel=0.03)


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("name", GPU_FORMS)
def test_the_composed_peak_is_that_of_a_whole_step_in_the_forms_of_a_gpu(name):
    composed, whole = in_child(compose_and_trace, name)
    print({key: f"{peak / whole[key] - 1:+.4f}" for key, peak in peaks_of(composed).items()})
    assert peaks_of(composed) == pytest.approx(whole, rel=0.03)


def test_cpu_ranks_hold_what_was_composed(traced):
    name, composed, _ = traced
    run = RUNS[name]
    measured: Peaks = {}
    for taught in (False, True)[: 1 + (run.teacher is not None)]:
        for rank, peak in enumerate(run_ranks(run.layout.world_size, measure, name, taught)):
            key = run.layout.coordinates(rank).pp, taught
            measured[key] = max(measured.get(key, 0), peak)
    assert peaks_of(composed) == pytest.approx(measured, rel=0.1)


def measure(name: str, taught: bool) -> int:
    """In a rank: the most bytes of tensors that are alive in a step."""
    from megatron_salt.planner.tracing.whole_step import peak_of_step

    return peak_of_step(RUNS[name], taught)

"""Garbage is collected at fixed steps, and chosen steps are traced."""

from __future__ import annotations

import gc
import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_salt.config import TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.metrics.profiling import GarbageSchedule, Profiler


def collections_after(monkeypatch: pytest.MonkeyPatch, training: TrainingConfig) -> list[int]:
    collected: list[int] = []
    step = 0
    monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
    schedule = GarbageSchedule(training)
    schedule.start()
    try:
        assert gc.isenabled() != training.manual_gc
        for step in range(1, 8):
            schedule.after_step(step)
    finally:
        schedule.stop()
    assert gc.isenabled()
    return collected


def test_garbage_is_collected_at_the_start_and_at_fixed_steps(monkeypatch):
    assert collections_after(monkeypatch, TrainingConfig(manual_gc=True, manual_gc_interval=3)) == [0, 3, 6]


def test_interval_0_collects_at_the_start_alone_and_without_manual_gc_nothing_changes(monkeypatch):
    assert collections_after(monkeypatch, TrainingConfig(manual_gc=True, manual_gc_interval=0)) == [0]
    assert collections_after(monkeypatch, TrainingConfig(manual_gc_interval=3)) == []


def run_steps(training: TrainingConfig, directory: Path, rank: int = 0, first: int = 1, last: int = 6) -> dict[str, list[int]]:
    """{trace file: the steps in it}. Step n runs a region named after it."""
    profiler = Profiler(training, rank, directory)
    for step in range(first, last + 1):
        profiler.before_step(step)
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(2) + 1
    profiler.stop(last + 1)
    return {
        path.name: sorted(
            int(event["name"][5:])
            for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            if event["name"].startswith("step-")
        )
        for path in directory.glob("*")
    }


PROFILED = TrainingConfig(profile=True, profile_step_start=3, profile_step_end=5, profile_ranks=(0, 2))


@pytest.mark.parametrize(
    "first, last, name, steps",
    [
        (1, 6, "rank0.steps3-4.pt.trace.json.gz", [3, 4]),
        (4, 6, "rank0.steps4-4.pt.trace.json.gz", [4]),  # resumed inside the range
        (1, 3, "rank0.steps3-3.pt.trace.json.gz", [3]),  # ended inside the range
    ],
)
def test_the_trace_has_the_chosen_steps(tmp_path, first, last, name, steps):
    assert run_steps(PROFILED, tmp_path, first=first, last=last) == {name: steps}


def test_other_ranks_other_steps_and_runs_without_the_flag_are_not_profiled(tmp_path):
    assert run_steps(PROFILED, tmp_path, rank=1) == {}
    assert run_steps(PROFILED, tmp_path, first=5) == {}
    assert run_steps(TrainingConfig(profile_step_start=3, profile_step_end=5), tmp_path) == {}


def test_a_trace_needs_a_place():
    with pytest.raises(UserError, match="--tensorboard-dir or --save"):
        Profiler(PROFILED, rank=1, directory=None)
    Profiler(TrainingConfig(), rank=0, directory=None)

"""--search: its winners are those of brute force, its traces are shared, and its flags give the layout back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_salt.cli import parse
from megatron_salt.config.yaml_text import to_yaml
from megatron_salt.planner.compose import compose
from megatron_salt.planner.memory import GIB
from megatron_salt.planner.planned_run import PlannedRun
from megatron_salt.planner.search.report import search_lines
from megatron_salt.planner.search.search import BEST, NO_HOST, SearchResult, search
from megatron_salt.planner.search.space import _splits, flags_of, space
from megatron_salt.planner.time.roofline import step_time
from megatron_salt.planner.trace import NOTHING, ChunkTrace, Part, Traces, TraceTask
from tests.planner.runs import planned
from tests.planner.test_roofline import BY_FLOPS

BASE = planned(4, (1, 1))


def invented(task: TraceTask) -> Traces:
    """Traces without torch. They depend on what real ones depend on."""
    parallel, selective = task.setting.parallel, task.setting.parallel.recompute_granularity == "selective"

    def chunk(samples: int, ends: int, split: int) -> ChunkTrace:
        hidden = samples * 4096 // split
        layer = Part(9 * hidden, (3 if selective else 6) * hidden)
        return ChunkTrace(
            embedding=Part(hidden, hidden), layer=layer, head=Part(ends * hidden, 0), head_backward=NOTHING,
            layer_backward=Part(4 * hidden, -layer.change), embedding_backward=Part(hidden, -hidden), hidden=hidden, before_layer=hidden,
            kept=0,
        )  # fmt: skip

    split = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    student = {
        one: chunk(one.samples, 5 * one.last + one.first + (one.teacher_hidden or 0) // 16, split) for one in task.student
    }
    teacher = None if task.teacher is None else chunk(task.teacher.samples, 2, task.teacher.tensor)
    return Traces(student=student, teacher=teacher)


def layouts() -> tuple[list[PlannedRun], tuple[str, ...]]:
    """The runs of a small search, and what the trainer says of the others."""
    found = space(BASE.config, 4, gpus_per_node=2)
    return [replace(BASE, config=one.config, layout=one.layout, plan=one.plan) for one in found.candidates], found.refused


def searched(usable: float, most: int, trace: list[TraceTask]) -> SearchResult:
    def record(tasks: Sequence[TraceTask]) -> list[Traces]:
        trace.extend(tasks)
        return [invented(task) for task in tasks]

    runs, refused = layouts()
    return search(runs, refused, machine_of=lambda _: BY_FLOPS, usable=usable, most=most, trace=record)


@pytest.fixture(scope="module")
def by_hand() -> list[tuple[float, float, PlannedRun]]:
    """(seconds of the run, GiB, the run) of every layout, each with traces of its own; the fastest first."""
    runs = []
    for run in layouts()[0]:
        steps = run.plan.total_steps
        seconds = 5 * step_time(run, BY_FLOPS, taught=True).total + (steps - 5) * step_time(run, BY_FLOPS, taught=False).total
        runs.append((seconds, compose(run, invented(run.trace_task()), NO_HOST).most / GIB, run))
    return sorted(runs, key=lambda one: one[0])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_winners_are_those_of_brute_force(by_hand, share):
    usable = sorted(gib for _, gib, _ in by_hand)[int(share * len(by_hand))]
    fits = [(seconds, gib) for seconds, gib, _ in by_hand if gib <= usable]
    traced: list[TraceTask] = []
    result = searched(usable, len(by_hand), traced)
    assert result.fit == len(fits) and result.slower == 0
    best: dict[str, float] = {}  # of each layout the fastest amount of recomputation that fits
    for seconds, gib, run in by_hand:
        if gib <= usable:
            best.setdefault(f"{run.layout} {run.plan} {run.config.salt} {run.config.parallel.virtual_stages}", seconds)
    assert [found.timed.seconds for found in result.best] == pytest.approx(list(best.values())[:BEST])
    assert all(found.memory.most / GIB <= usable for found in result.best)
    assert sum(count for _, count, _ in result.too_large) == len(by_hand) - len(fits)
    asked = [(task.setting, one) for task in traced for one in (*task.student, task.teacher) if one is not None]
    assert len(set(asked)) == len(asked) < len(by_hand) / 2  # each once, and shared


def test_slower_layouts_are_traced_where_fewer_than_ten_fit(by_hand):
    everything = searched(1e9, 1, [])
    assert len(everything.best) == BEST and 0 < everything.slower < len(by_hand) - BEST
    nothing = searched(0.0, 1, [])
    assert not nothing.best and nothing.slower == 0
    [(cause, count, gib)] = nothing.too_large
    assert "alone are too large" in cause and count == len(by_hand) and gib > 0


def test_refusals_are_counted_by_their_words():
    result = searched(1e9, 1, [])
    assert sum(count for _, count in result.refused) == len(layouts()[1])
    texts = [re.sub(r"[\d.]+", "", message) for message, _ in result.refused]
    assert len(texts) == len(set(texts))
    lines = search_lines(result, BASE.config, 75.6)
    assert lines[0].startswith("1. about ") and lines[1].strip()


def test_the_flags_of_a_layout_give_the_layout(by_hand, tmp_path):
    file = tmp_path / "run.yaml"
    recomputing = replace(
        BASE.config, parallel=replace(BASE.config.parallel, recompute_granularity="full", recompute_method="block", recompute_num_layers=1)
    )  # fmt: skip
    file.write_text(to_yaml(recomputing))
    for _, _, run in by_hand[:: len(by_hand) // 12]:
        words = " ".join(flags_of(run.config, recomputing)).split()
        assert parse(["--config", str(file), *words]) == run.config


def test_the_last_stage_may_have_fewer_layers():
    assert list(_splits(28, 1)) == [(1, None)]
    assert list(_splits(28, 4)) == [(1, None), (1, 4)]
    assert [last for _, last in _splits(28, 2) if last is not None] == [10, 11, 12, 13]
    assert list(_splits(28, 3)) == [(1, 6), (1, 8)]  # 11 11 6 and 10 10 8


def test_a_heavy_head_takes_layers_off_the_last_stage():
    """Two stages of four layers: with 4,096 ids the head costs as much as three layers, with 257 less than one."""
    even, fewer = (
        next(
            run for run in layouts()[0]
            if (run.layout.pipeline, run.layout.tensor, run.config.parallel.decoder_last_pipeline_num_layers) == (2, 1, last)
            and run.config.parallel.virtual_stages is None and run.config.parallel.recompute_granularity is None
        )
        for last in (None, 1)
    )  # fmt: skip
    for ids, best in ((4096, fewer), (257, even)):
        runs = [replace(run, vocabulary_size=ids) for run in (even, fewer)]
        result = search(
            runs, (), machine_of=lambda _: BY_FLOPS, usable=1e9, most=2, trace=lambda tasks: [invented(task) for task in tasks]
        )
        [found] = result.best  # the other split of the layers is slower
        assert found.timed.run.config == best.config and result.fit == 2
    assert flags_of(fewer.config, even.config) == ["--decoder-last-pipeline-num-layers 1"]

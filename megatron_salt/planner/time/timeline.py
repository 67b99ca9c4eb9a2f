"""When each pass of a step runs on each pipeline stage. Pure.

A pass begins when its stage is free and its input is there. So warm-up, bubbles and uneven stages follow from the order of passes, which
is megatron-core's (`schedule.py`), and from seconds alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_salt.planner.schedule import Pass, all_passes, counted_microbatches


@dataclass(frozen=True)
class ChunkSeconds:
    """Seconds of one microbatch in one model chunk."""

    forward: float
    backward: float


@dataclass(frozen=True, kw_only=True)
class TimedPass:
    """One pass, and when it runs: seconds from the first pass of the step."""

    kind: str
    chunk: int
    microbatch: int
    start: float
    end: float


Stages = Sequence[Sequence[ChunkSeconds]]
"""Seconds of each chunk of each pipeline stage"""


def timeline(stages: Stages, num_microbatches: int, delay: float) -> list[list[TimedPass]]:
    """All passes of a step on each stage, in order. delay: seconds from the end of a pass to the arrival of what it sends."""
    count, chunks = len(stages), len(stages[0])
    orders = [_numbered(all_passes(stage, count, chunks, num_microbatches), chunks) for stage in range(count)]
    done: dict[tuple[str, int, int, int], float] = {}
    result: list[list[TimedPass]] = [[] for _ in stages]
    ready = list(range(count))
    while ready:
        stage = ready.pop()
        while len(result[stage]) < len(orders[stage]):
            kind, chunk, microbatch = orders[stage][len(result[stage])]
            source = _source(kind, stage, chunk, count, chunks)
            arrival = 0.0
            if source is not None:
                if (kind, *source, microbatch) not in done:
                    break
                arrival = done[kind, *source, microbatch] + (delay if source[0] != stage else 0.0)
            start = max(arrival, result[stage][-1].end if result[stage] else 0.0)
            seconds = stages[stage][chunk]
            end = start + (seconds.forward if kind == "forward" else seconds.backward)
            result[stage].append(TimedPass(kind=kind, chunk=chunk, microbatch=microbatch, start=start, end=end))
            done[kind, stage, chunk, microbatch] = end
            ready += [other for other in _neighbours(stage, count) if other not in ready]
    assert all(len(got) == len(order) for got, order in zip(result, orders, strict=True)), "the schedule waits for itself"
    return result


def passes_seconds(stages: Stages, num_microbatches: int, delay: float) -> float:
    """Seconds from the first pass of a step to the end of its last.

    The beginning and the end are those of a timeline of fewer microbatches. Between them the busiest stage is never idle.
    """
    counted = counted_microbatches(len(stages), len(stages[0]), num_microbatches)
    ends = [passes[-1].end for passes in timeline(stages, counted, delay)]
    return max(ends) + (num_microbatches - counted) * busiest_seconds(stages)


def busiest_seconds(stages: Stages) -> float:
    """Seconds of one microbatch on the stage that has most to do."""
    return max(sum(chunk.forward + chunk.backward for chunk in chunks) for chunks in stages)


def _numbered(order: list[Pass], chunks: int) -> list[tuple[str, int, int]]:
    """(kind, chunk, microbatch): each chunk takes the microbatches in turn."""
    following = {(kind, chunk): 0 for kind in ("forward", "backward") for chunk in range(chunks)}
    numbered: list[tuple[str, int, int]] = []
    for one in order:
        numbered.append((one.kind, one.chunk, following[one.kind, one.chunk]))
        following[one.kind, one.chunk] += 1
    return numbered


def _source(kind: str, stage: int, chunk: int, stages: int, chunks: int) -> tuple[int, int] | None:
    """(stage, chunk) that gives a pass its input; None: the pass needs no other stage."""
    step = -1 if kind == "forward" else 1
    place = chunk * stages + stage + step  # chunks lie one after another over the stages
    return (place % stages, place // stages) if 0 <= place < stages * chunks else None


def _neighbours(stage: int, stages: int) -> set[int]:
    """The stages that may wait for a stage."""
    return {(stage - 1) % stages, (stage + 1) % stages} - {stage}

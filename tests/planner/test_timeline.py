"""The timeline of a step: 1F1B and its interleaved form, against a clock that ticks and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_salt.planner.schedule import all_passes
from megatron_salt.planner.time.timeline import ChunkSeconds, passes_seconds, timeline


def ticking(stages: list[list[tuple[int, int]]], num_microbatches: int, delay: int) -> list[list[tuple[str, int, int, int]]]:
    """The slow twin, in whole ticks: at each tick every idle stage begins its next pass if the input has arrived.

    Returns (kind, chunk, start, end) of the passes of each stage. stages: (forward, backward) ticks of each chunk."""
    count, chunks = len(stages), len(stages[0])
    orders = [all_passes(stage, count, chunks, num_microbatches) for stage in range(count)]
    result: list[list[tuple[str, int, int, int]]] = [[] for _ in stages]
    sent: dict[tuple[str, int, int], list[int]] = {}  # (kind, to stage, to chunk): ticks of arrival
    taken: dict[tuple[str, int, int], int] = {}
    now = 0
    while any(len(got) < len(order) for got, order in zip(result, orders, strict=True)):
        for stage in range(count):
            if len(result[stage]) == len(orders[stage]) or (result[stage] and result[stage][-1][3] > now):
                continue
            one = orders[stage][len(result[stage])]
            first = stage == 0 and one.chunk == 0 if one.kind == "forward" else stage == count - 1 and one.chunk == chunks - 1
            key = (one.kind, stage, one.chunk)
            if not first:
                arrived = sent.get(key, [])
                number = taken.get(key, 0)
                if len(arrived) <= number or arrived[number] > now:
                    continue
            taken[key] = taken.get(key, 0) + 1
            end = now + stages[stage][one.chunk][one.kind == "backward"]
            result[stage].append((one.kind, one.chunk, now, end))
            if one.kind == "forward":
                to = (stage + 1, one.chunk) if stage < count - 1 else (0, one.chunk + 1)
            else:
                to = (stage - 1, one.chunk) if stage > 0 else (count - 1, one.chunk - 1)
            sent.setdefault((one.kind, *to), []).append(end + (delay if to[0] != stage else 0))
        now += 1
    return result


@pytest.mark.parametrize("stages, chunks, num_microbatches, delay", [
    (1, 1, 3, 2), (2, 1, 1, 0), (2, 1, 5, 3), (4, 1, 3, 0), (4, 1, 9, 2), (2, 2, 4, 0), (2, 3, 6, 1), (4, 2, 8, 3),
])  # fmt: skip
def test_the_timeline_is_that_of_a_clock_that_ticks(stages, chunks, num_microbatches, delay):
    random = np.random.default_rng(stages * 100 + chunks)
    ticks = [[tuple(random.integers(1, 9, 2).tolist()) for _ in range(chunks)] for _ in range(stages)]
    seconds = [[ChunkSeconds(*chunk) for chunk in stage] for stage in ticks]
    got = timeline(seconds, num_microbatches, delay)
    assert [[(one.kind, one.chunk, one.start, one.end) for one in stage] for stage in got] == ticking(
        ticks, num_microbatches, delay
    )


@pytest.mark.parametrize("stages, num_microbatches", [(1, 4), (2, 2), (4, 4), (4, 50), (8, 20)])
def test_equal_stages_have_the_bubble_of_the_closed_form(stages, num_microbatches):
    seconds = [[ChunkSeconds(2.0, 4.0)]] * stages
    assert passes_seconds(seconds, num_microbatches, 0.0) == pytest.approx((num_microbatches + stages - 1) * 6.0)


@pytest.mark.parametrize("stages, chunks, num_microbatches", [(2, 2, 8), (4, 2, 16), (4, 4, 8)])
def test_interleaving_divides_the_bubble(stages, chunks, num_microbatches):
    seconds = [[ChunkSeconds(2.0 / chunks, 4.0 / chunks)] * chunks] * stages
    bubble = (stages - 1) * 6.0 / chunks
    assert passes_seconds(seconds, num_microbatches, 0.0) == pytest.approx(num_microbatches * 6.0 + bubble)


@pytest.mark.parametrize("stages, chunks", [(2, 1), (4, 1), (4, 2)])
def test_a_long_step_is_as_if_every_pass_were_listed(stages, chunks):
    random = np.random.default_rng(3)
    seconds = [[ChunkSeconds(*random.uniform(1, 3, 2)) for _ in range(chunks)] for _ in range(stages)]
    whole = max(stage[-1].end for stage in timeline(seconds, 200, 0.01))
    assert passes_seconds(seconds, 200, 0.01) == pytest.approx(whole, rel=0.005)

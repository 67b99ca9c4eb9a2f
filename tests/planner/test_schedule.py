"""The order of passes: every microbatch goes forward and back through every chunk, and as many are in flight as the schedule says."""

from __future__ import annotations

import pytest

from megatron_salt.planner.schedule import passes


def in_flight(stage: int, stages: int, chunks: int, num_microbatches: int) -> int:
    """The most forward passes that wait for their backward pass."""
    count = most = 0
    for one in passes(stage, stages, chunks, num_microbatches):
        count += 1 if one.kind == "forward" else -1
        most = max(most, count)
    assert count == 0
    return most


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 8, 100])
def test_1f1b_has_as_many_in_flight_as_stages_follow(stages, num_microbatches):
    for stage in range(stages):
        assert in_flight(stage, stages, 1, num_microbatches) == min(stages - stage, num_microbatches)


@pytest.mark.parametrize("stages, chunks", [(2, 2), (4, 2), (4, 3)])
def test_interleaving_warms_up_longer(stages, chunks):
    for stage in range(stages):
        warm = (stages - stage - 1) * 2 + (chunks - 1) * stages
        assert in_flight(stage, stages, chunks, 8 * stages) == warm + 1


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_chunk_gets_every_microbatch_and_its_backward_pass_comes_later(stage):
    waiting = [0, 0]
    for one in passes(stage, 4, 2, 8):
        waiting[one.chunk] += 1 if one.kind == "forward" else -1
        assert waiting[one.chunk] >= 0
    assert waiting == [0, 0]
    order = passes(stage, 4, 2, 8)
    assert [sum(one.chunk == chunk and one.kind == "forward" for one in order) for chunk in (0, 1)] == [8, 8]

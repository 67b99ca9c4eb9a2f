"""The picture of a plan: its bars and blocks are those of the plan, and the file is what its name says."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_salt.planner.memory import GIB, HostMemory, Moment, PlannedMemory, RankMemory
from megatron_salt.planner.picture import bars, blocks, draw, drawn_microbatches
from megatron_salt.planner.time.roofline import step_time
from tests.planner.runs import planned
from tests.planner.test_roofline import BY_FLOPS

MOMENT = Moment(at="a pass", bytes={"activations": 3 * GIB, "parameters": GIB})
MEMORY = PlannedMemory(
    stages=(RankMemory(pipeline_stage=0, place=0, stage1=MOMENT, stage2=MOMENT),), host=HostMemory(staged=0, gathered=0)
)
RUN = planned(2, (1, 1), pipeline_model_parallel_size=2)


def test_a_bar_has_the_bytes_of_its_moment():
    first, second = bars(MEMORY)
    assert (first.label, second.label) == ("pp 0\nstage 1", "pp 0\nstage 2")
    assert first.parts == (("parameters", 1.0), ("activations", 3.0))


def test_blocks_fill_the_step_but_for_the_bubble():
    step = step_time(RUN, BY_FLOPS, taught=True)
    count = RUN.plan.num_microbatches
    rows = blocks(step, count)
    assert len(rows) == 2 and drawn_microbatches(step, 100) == 8
    for stage in rows:
        assert stage[0].phase == "teacher" and stage[0].seconds == step.teacher
        assert all(a.start + a.seconds <= b.start + 1e-12 for a, b in pairwise(stage))
    ends = [stage[-1].start + stage[-1].seconds for stage in rows]
    assert max(ends) == pytest.approx(step.teacher + step.exchange + step.passes)
    busiest = max(sum(block.seconds for block in stage if block.phase in ("forward", "backward")) for stage in rows)
    assert busiest == pytest.approx(step.passes - step.bubble)


@pytest.mark.parametrize("name, begins", [("plan.svg", b"<?xml"), ("plan.png", b"\x89PNG")])
def test_the_file_has_the_format_of_its_name(tmp_path, name, begins):
    step = step_time(RUN, BY_FLOPS, taught=True) if name.endswith("svg") else None
    draw(MEMORY, 80.0, 75.6, step, RUN.plan.num_microbatches, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [file.name for file in tmp_path.iterdir()] == [name]

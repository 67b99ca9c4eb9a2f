"""Process groups hold the ranks of the layout, on every rank, and communicate."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh
from tests.support.ranks import run_ranks

VARYING = dict(tp=["tp"], cp=["cp"], dp=["dp"], pp=["pp"], mp=["tp", "pp"], tp_cp=["tp", "cp"], dp_cp=["cp", "dp"],
               tp_dp_cp=["tp", "cp", "dp"])  # fmt: skip


def look(layout: Layout) -> dict:
    """The ranks of each group, and the sum of its members' ranks from an all-reduce."""
    mesh = make_student_mesh(layout, 2 if layout.pipeline > 1 else None)
    assert mesh.rank == dist.get_rank() and mesh.at == layout.coordinates(mesh.rank)
    assert mesh.is_first_stage == parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    assert mesh.is_last_stage == parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() == (2 if layout.pipeline > 1 else None)
    seen = {}
    for name in (*VARYING, "embd", "pos_embd"):
        group = getattr(mesh.groups, name)
        if group is not None and dist.get_rank(group) >= 0:
            total = torch.tensor(mesh.rank)
            dist.all_reduce(total, group=group)
            seen[name] = dist.get_process_group_ranks(group)
            assert int(total) == sum(seen[name])
    return seen


@pytest.mark.parametrize("layout", [Layout(tensor=2, pipeline=2), Layout(context=2, data=2), Layout(pipeline=4), Layout(tensor=2, data=2)],
                         ids=str)  # fmt: skip
def test_live_groups_are_the_layouts(layout):
    for rank, groups in enumerate(run_ranks(4, look, layout)):
        for name, varying in VARYING.items():
            assert groups[name] == next(group for group in layout.groups(*varying) if rank in group), name
        stages = next(group for group in layout.groups("pp") if rank in group)
        ends = sorted({stages[0], stages[-1]})  # first and last stage share the tied embedding
        assert groups.get("embd") == (ends if rank in ends else None)
        assert groups.get("pos_embd") == ([stages[0]] if rank == stages[0] else None)

"""Process groups hold the ranks of the layout, on every rank, and communicate."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state

from megatron_salt.config import ParallelConfig
from megatron_salt.metrics.phases import PhaseTimer
from megatron_salt.parallel.hardware import release
from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_student_mesh, make_teacher_mesh, new_group_of, teacher_groups, warm_up
from megatron_salt.salt.routing import teacher_layout
from megatron_salt.salt.schedule import StepWeights
from megatron_salt.train.step import train_step
from tests.parallel.traffic import CountedStore, Traffic
from tests.support.ranks import run_ranks
from tests.support.small import Case, batch, build_student
from tests.support.teaching import Lesson, admit, lessons, make_teacher

MINUTE, SOON = timedelta(minutes=1), timedelta(seconds=30)
WORLD = "default_pg"
PADS = release(torch.__version__) < (2, 14)
"""Whether ranks must agree on the number of their groups before they make the teacher's."""

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


def member_count(world_size: int, rank: int) -> tuple[int, list[list[int]]]:
    """Calls of new_group in a world of ranks that do not exist, and the ranks of the teacher's groups and of the block."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        student = Layout(tensor=2, pipeline=2, data=world_size // 4)
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            make = dist.new_group
            patch.setattr(dist, "new_group", lambda *ranks, **how: calls.append(ranks) or make(*ranks, **how))
            mesh = make_teacher_mesh(teacher_layout(student, 2, 1))
            block = new_group_of(student.groups("tp", "pp"), MINUTE, "block")
        groups = [mesh.groups.tp, mesh.groups.pp, mesh.groups.dp, mesh.groups.cp, block]
        return len(calls), [dist.get_process_group_ranks(group) for group in groups]
    finally:
        dist.destroy_process_group()


def test_the_number_of_groups_that_a_rank_makes_for_the_teacher_does_not_grow_with_the_world():
    for world_size in (8, 64, 512):
        teacher = teacher_layout(Layout(tensor=2, pipeline=2, data=world_size // 4), 2, 1)
        for rank in (0, 3, world_size // 2 + 1, world_size - 1):
            calls, groups = member_count(world_size, rank)
            assert calls == 5
            expected = [next(group for group in teacher.groups(name) if rank in group) for name in ("tp", "pp", "dp", "cp")]
            assert groups[:-1] == [sorted(group) for group in expected] and rank in groups[-1] and len(groups[-1]) == 4


def teachers_groups(student: Layout, tensor: int, pipeline: int) -> dict:
    """What a rank sees of the teacher's groups, and of the store while they are made; they are destroyed again."""
    mesh = make_student_mesh(student)
    world, before = dist.distributed_c10d._world, len(dist.distributed_c10d._world.pg_names)
    backend, store = world.pg_map[dist.group.WORLD]
    counted = CountedStore(store)
    world.pg_map[dist.group.WORLD] = (backend, counted)
    with Traffic() as traffic:
        teacher = make_teacher_mesh(teacher_layout(student, tensor, pipeline), SOON)
        block = new_group_of(student.groups("tp", "cp", "pp"), SOON, "block")
        warm_up(block)
    world.pg_map[dist.group.WORLD] = (backend, store)
    groups = dict(tp=teacher.groups.tp, pp=teacher.groups.pp, dp=teacher.groups.dp, cp=teacher.groups.cp, block=block)
    made = [*teacher_groups(teacher), block]
    seen: dict = {"ranks": {name: dist.get_process_group_ranks(group) for name, group in groups.items()}}
    seen["names"] = {name: group.group_name for name, group in groups.items()}
    seen["foreign keys"] = [key for key in counted.keys if key.split("/")[0] not in {group.group_name for group in made}]
    seen["operations"] = len(counted.keys)
    seen["padding"], seen["warm"] = len(teacher.padding), traffic.groups
    for name, group in groups.items():
        total = torch.tensor(mesh.rank)
        dist.all_reduce(total, group=group)
        assert int(total) == sum(seen["ranks"][name])
    for group in made:
        dist.destroy_process_group(group)
    assert len(dist.distributed_c10d._world.pg_names) == before
    return seen


@pytest.mark.parametrize("student, teacher, padding", [
    (Layout(pipeline=4), (2, 2), [0, 2, 2, 1]), (Layout(tensor=2, pipeline=2), (4, 1), [0, 0, 1, 1]),
    (Layout(data=2, context=2), (2, 1), [0, 0, 0, 0]),
])  # fmt: skip
def test_members_alone_make_the_teachers_groups(student, teacher, padding):
    """The first stages hold more groups of the student than the others. Before 2.14 torch names a group after the number of those."""
    layout = teacher_layout(student, *teacher)
    seen = run_ranks(4, teachers_groups, student, *teacher)
    assert [rank["padding"] for rank in seen] == (padding if PADS else [0] * 4)
    for rank, mine in enumerate(seen):
        for name in ("tp", "pp", "dp", "cp"):
            assert mine["ranks"][name] == sorted(next(group for group in layout.groups(name) if rank in group))
        assert mine["ranks"]["block"] == next(group for group in student.groups("tp", "cp", "pp") if rank in group)
        for name, ranks in mine["ranks"].items():
            assert {seen[member]["names"][name] for member in ranks} == {mine["names"][name]}
        assert mine["operations"] > 0 and mine["foreign keys"] == []
        warm = (
            {f"{name} of the teacher" for name in ("tp", "pp") if len(mine["ranks"][name]) > 1}
            | {"block"}
            | ({WORLD} if PADS else set())
        )
        assert mine["warm"] == warm  # the world agrees on the number of groups


# First used when model and optimizer are built, or at the end of the first step, without point-to-point.
AT_BUILD = {"MODEL_PARALLEL_GROUP", "EMBEDDING_GROUP", "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"}


def warmed_and_used(lesson: Lesson) -> tuple[set[str], set[str], set[str]]:
    """The groups that start-up warms, those that a step uses, and those of them with point-to-point operations."""
    with Traffic() as start:
        student = build_student(lesson.case, 4)
        ignored = start.groups & AT_BUILD
        teacher = admit(lesson, student)
    lessons(student, teacher, lesson, 1)
    with Traffic() as step:
        train_step(student, batch(student, lesson.case, 1), PhaseTimer(), teacher, StepWeights(soft_labels=0.5))
    paired = {group for group, operation in step.calls if operation in ("send", "recv_")}
    return start.groups - ignored, step.groups, paired


@pytest.mark.parametrize("parallel, teacher", [
    (ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), (1, 2)),
    (ParallelConfig(context_parallel_size=2, use_distributed_optimizer=True), (2, 1)),
], ids=["tp2 pp2, teacher pp2", "cp2 dp2, teacher tp2"])  # fmt: skip
def test_a_step_uses_the_groups_that_were_warmed(tmp_path, parallel, teacher):
    run_ranks(1, make_teacher, tmp_path)
    for warmed, used, paired in run_ranks(4, warmed_and_used, Lesson(Case(parallel), str(tmp_path), teacher)):
        assert paired <= warmed  # a batch of these must not be the first operation of its group
        assert warmed - {WORLD, "dp of the teacher"} == used - AT_BUILD  # reading the teacher's checkpoint uses these two

"""Host time that one rank needs to make the teacher's process groups, against naming every group of the world.

    python benchmarks/process_groups.py          half a minute, one process

The world's other ranks do not exist (torch's "fake" backend), so no communication is measured: only what each rank's host does. The rival
calls `dist.new_subgroups_by_enumeration` for the same groups, as megatron-core does for the student's. Both take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from results import result
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron: see there)

from megatron_salt.parallel.layout import Layout
from megatron_salt.parallel.mesh import make_teacher_mesh, new_group_of
from megatron_salt.salt.routing import teacher_layout

SIZES = (64, 512, 4096)
REPEATS = 5
TIMEOUT = timedelta(minutes=1)


def members_alone(student: Layout, teacher: Layout) -> None:
    """As a run makes them."""
    make_teacher_mesh(teacher, TIMEOUT)
    new_group_of(student.groups("tp", "cp", "pp"), TIMEOUT, "block")


def every_group(student: Layout, teacher: Layout) -> None:
    """Each rank names each group of each kind."""
    for partition in (teacher.groups("tp"), teacher.groups("pp"), teacher.groups("dp"), student.groups("tp", "cp", "pp")):
        dist.new_subgroups_by_enumeration(partition, timeout=TIMEOUT)
    dist.new_group([dist.get_rank()], timeout=TIMEOUT, use_local_synchronization=True)


def seconds(make: Callable[[Layout, Layout], None], world_size: int) -> float:
    """CPU seconds of one rank of a new world: groups of a teacher of tp 2 in student replicas of tp 2 x pp 2."""
    student = Layout(tensor=2, pipeline=2, data=world_size // 4)
    teacher = teacher_layout(student, 2, 1)
    dist.init_process_group("fake", store=FakeStore(), rank=world_size // 2 + 1, world_size=world_size)
    try:
        start = time.process_time()
        make(student, teacher)
        return time.process_time() - start
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Print a table and the figure."""
    print(f"{'ranks':>8}{'members alone, ms':>20}{'every group, ms':>20}{'ratio':>10}")
    ratio = 0.0
    for size in SIZES:
        pairs = [(seconds(members_alone, size), seconds(every_group, size)) for _ in range(REPEATS)]
        ours, rival = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = ours / rival
        print(f"{size:>8}{ours * 1e3:>20.1f}{rival * 1e3:>20.1f}{ratio:>9.3f}x")
    result(f"teachers_groups_host_time_{SIZES[-1]}_ranks", ratio, 0.5, lower_is_better=True)


if __name__ == "__main__":
    main()

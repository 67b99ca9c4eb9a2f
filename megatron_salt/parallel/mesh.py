"""The process groups of a layout.

The student's groups are registered with megatron-core's `parallel_state`, because megatron-core and Transformer Engine read it. Our
own code never does: a function that communicates takes the mesh, or the one group that it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_salt.parallel.collectives import largest
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.hardware import release
from megatron_salt.parallel.layout import Coordinates, Layout


@dataclass(frozen=True)
class Mesh:
    """The layout of one model, and the groups of this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    rank: int
    """Global rank."""
    padding: tuple[dist.ProcessGroup, ...] = ()
    """Groups of this rank alone that nobody uses, see `_level`."""

    @property
    def at(self) -> Coordinates:
        """This rank's coordinates."""
        return self.layout.coordinates(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.at.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head, and so the loss."""
        return self.at.pp == self.layout.pipeline - 1


def warm_up(*groups: dist.ProcessGroup) -> None:
    """One small all-reduce in each group of more than one rank. Collective over the groups, in the same order on all members.

    A batched point-to-point exchange can hang if it is the first NCCL operation of its group. After this it never is. NCCL makes a
    communicator, with its memory on the GPU, at the first operation: so only groups that each training step uses are warmed.
    """
    token = torch.zeros(1, device=current_device())
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(token, group=group)


def make_teacher_mesh(layout: Layout, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Make the groups of a second model over the same ranks, in a fixed order; `parallel_state` does not change.

    Collective over all ranks. For a model that only runs forward and has no output head: there are no embedding groups. Each rank makes
    its own groups alone. `new_group_of` may follow, for groups that all ranks make. Once in a run: the groups of a second teacher, after
    the first is freed, would have the names of the first, and find its addresses in the store.
    """
    assert layout.world_size == dist.get_world_size() and layout.context == 1, (layout, dist.get_world_size())
    groups, rank = ProcessGroupCollection(), dist.get_rank()
    padding = _level(timeout)
    groups.tp = groups.tp_cp = new_group_of(layout.groups("tp"), timeout, "tp of the teacher")
    groups.pp = new_group_of(layout.groups("pp"), timeout, "pp of the teacher")
    groups.dp = groups.dp_cp = new_group_of(layout.groups("dp"), timeout, "dp of the teacher")
    groups.cp = new_group_of([[rank]], timeout, "cp of the teacher")
    for name in (
        "mp",
        "tp_dp_cp",
        "embd",
        "pos_embd",
        "ep",
        "expt_tp",
        "expt_dp",
        "tp_ep",
        "tp_ep_pp",
    ):  # megatron-core 0.16 reads some
        setattr(groups, name, None)
    mesh = Mesh(layout, groups, rank, padding)
    warm_up(groups.tp, groups.pp)  # dp serves only while the weights are loaded
    return mesh


def new_group_of(partition: Sequence[Sequence[int]], timeout: timedelta, description: str) -> dist.ProcessGroup:
    """Make this rank's group of a partition, and no other rank's: its members alone take part, in the same order of groups on each.

    torch names such a group after its ranks and a count, which must be the same on all members, or each waits under another name: see
    `_level`. `dist.init_process_group` must not get a device_id: NCCL would split each new group off the
    world's communicator, which all ranks must do together.
    """
    own = next(ranks for ranks in partition if dist.get_rank() in ranks)
    return dist.new_group(list(own), timeout=timeout, use_local_synchronization=True, group_desc=description)


def _level(timeout: timedelta) -> tuple[dist.ProcessGroup, ...]:
    """Groups of this rank alone, so many that all ranks then hold equally many groups. Collective over all ranks.

    Before torch 2.14 the count in a group's name is that of the groups which the process holds. Ranks differ there by one or two: only some
    pipeline stages have embedding groups. From 2.14 on it is that of the calls which made groups, which are equally many on all ranks.
    """
    if release(torch.__version__) >= (2, 14):
        return ()
    held = len(dist.distributed_c10d._world.pg_names)
    return tuple(new_group_of([[dist.get_rank()]], timeout, "padding") for _ in range(largest(held) - held))


def teacher_groups(mesh: Mesh) -> list[dist.ProcessGroup]:
    """The groups that `make_teacher_mesh` made, in that order."""
    return [*mesh.padding, mesh.groups.tp, mesh.groups.pp, mesh.groups.dp, mesh.groups.cp]


def make_student_mesh(layout: Layout, virtual_stages: int | None = None, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Make the student's groups and register them with megatron-core. Collective over all ranks.

    virtual_stages: model chunks on each pipeline rank; None without interleaving.
    """
    assert layout.world_size == dist.get_world_size(), (layout, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
        create_gloo_process_groups=False,
    )
    mesh = Mesh(layout, ProcessGroupCollection.use_mpu_process_groups(), dist.get_rank())
    # The optimizer's and the embeddings' groups are first used when those are built, without point-to-point.
    groups = mesh.groups
    warm_up(groups.tp, groups.cp, groups.pp, groups.dp_cp)
    return mesh

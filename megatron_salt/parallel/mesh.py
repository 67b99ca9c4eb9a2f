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

from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.layout import Coordinates, Layout

_GROUPS = ("tp", "cp", "dp", "pp", "mp", "tp_cp", "dp_cp", "tp_dp_cp", "embd", "pos_embd")


@dataclass(frozen=True)
class Mesh:
    """The layout of one model, and the groups of this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    rank: int
    """Global rank."""

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

    def warm_up(self) -> None:
        """One small all-reduce in each group, in a fixed order. Collective over all ranks.

        A batched point-to-point exchange can hang if it is the first NCCL operation of its group. After this it never is.
        """
        token = torch.zeros(1, device=current_device())
        for name in _GROUPS:
            group = getattr(self.groups, name)
            if group is not None:
                dist.all_reduce(token, group=group)


def make_teacher_mesh(layout: Layout, timeout: timedelta = timedelta(minutes=10)) -> Mesh:
    """Make the groups of a second model over the same ranks, in a fixed order; `parallel_state` does not change.

    Collective over all ranks. For a model that only runs forward and has no output head: there are no embedding groups.
    """
    assert layout.world_size == dist.get_world_size() and layout.context == 1, (layout, dist.get_world_size())
    groups, rank = ProcessGroupCollection(), dist.get_rank()
    groups.tp = groups.tp_cp = new_group_of(layout.groups("tp"), timeout)
    groups.pp = new_group_of(layout.groups("pp"), timeout)
    groups.dp = groups.dp_cp = new_group_of(layout.groups("dp"), timeout)
    groups.cp = dist.new_group([rank], timeout=timeout, use_local_synchronization=True)
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
    mesh = Mesh(layout, groups, rank)
    mesh.warm_up()
    return mesh


def new_group_of(partition: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup:
    """Make the groups of a partition of all ranks and return this rank's. Collective over all ranks."""
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition], timeout=timeout)
    return group


def teacher_groups(mesh: Mesh) -> list[dist.ProcessGroup]:
    """The groups that `make_teacher_mesh` made, in that order."""
    return [mesh.groups.tp, mesh.groups.pp, mesh.groups.dp, mesh.groups.cp]


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
    mesh.warm_up()
    return mesh

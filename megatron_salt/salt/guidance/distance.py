"""How far the guided layer is from the teacher, for the log."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.model.guidance.term import GUIDE_METRICS
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh


def mean_distance(sums: Tensor | None, student: Mesh) -> Tensor:
    """Mean 1 - cosine of a step's valid tokens, a scalar on the device. Collective over all ranks; all receive.

    sums: float32 [GUIDE_METRICS], each token on one rank; None on ranks that hold none.
    """
    total = torch.zeros(len(GUIDE_METRICS), device=current_device()) if sums is None else sums.clone()
    dist.all_reduce(total, group=student.groups.mp)
    dist.all_reduce(total, group=student.groups.dp_cp)
    return total[1] / total[0].clamp(min=1)

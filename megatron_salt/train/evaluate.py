"""Loss on held-out data: the same windows every time, no gradient, no dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_salt.data.batch import Batches
from megatron_salt.model.loss import KD_METRICS, METRICS
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.salt.teacher import Teacher
from megatron_salt.train.step import forward_input, forward_step


class CutShort(Exception):
    """There is a reason to leave before an evaluation's last batch; what it has summed up is of no use."""

    def __init__(self, num_done: int, num_batches: int, reason: str) -> None:
        super().__init__(f"evaluation cut short after {num_done} of {num_batches} batches: {reason}")
        self.reason = reason


@torch.no_grad()
def evaluate(
    chunks: Sequence[nn.Module],
    batches: Batches,
    num_batches: int,
    mesh: Mesh,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    teacher: Teacher | None = None,
    reason_to_stop: Callable[[], str | None] = lambda: None,
) -> dict[str, float]:
    """Per-token means of the head's metrics over `num_batches` global batches, with a teacher also of its own. Collective over all
    ranks; all receive. The student's figures are the same with a teacher as without.

    reason_to_stop: asked before each batch, the same on every rank. Raises CutShort on every rank where there is one."""
    for chunk in chunks:
        chunk.eval()
    reason = None
    sums = torch.zeros(len(METRICS if teacher is None else KD_METRICS), dtype=torch.float64, device=current_device())
    for number in range(num_batches):
        if (reason := reason_to_stop()) is not None:
            break
        microbatches = batches.fetch(number * global_batch_size)
        targets = [None] * len(microbatches) if teacher is None else teacher.annotate(microbatches, kd_weight=0.0)
        inputs = [forward_input(microbatch, mesh, target) for microbatch, target in zip(microbatches, targets, strict=True)]
        for metrics in run_pipeline(chunks, forward_step, inputs, mesh, seq_length, micro_batch_size, forward_only=True):
            sums += metrics
    for chunk in chunks:
        chunk.train()
    if reason is not None:
        raise CutShort(number, num_batches, reason)
    return means(sums_over_replicas(sums, mesh))


def sums_over_replicas(sums: Tensor, mesh: Mesh) -> Tensor:
    """Add metric sums over data and context parallelism and give them to every stage. Collective over all ranks."""
    dist.all_reduce(sums, group=mesh.groups.dp_cp)
    dist.broadcast(sums, src=dist.get_process_group_ranks(mesh.groups.pp)[-1], group=mesh.groups.pp)
    return sums


def means(sums: Tensor) -> dict[str, float]:
    """Metric sums [metrics] -> {name: mean per token}, and the count of tokens itself under "tokens"."""
    return {name: float(mean) for name, mean in named_means(sums).items()}


def named_means(sums: Tensor) -> dict[str, Tensor]:
    """The same, still on the device. A teacher's metrics are known by the length of the sums."""
    names = METRICS if len(sums) == len(METRICS) else KD_METRICS
    tokens = sums[0]
    means = {name: total / tokens.clamp(min=1) for name, total in zip(names[1:], sums[1:], strict=True)}
    return {"tokens": tokens, **means}

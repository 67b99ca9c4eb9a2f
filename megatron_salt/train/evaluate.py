"""Loss on held-out data: the same windows every time, no gradient, no dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_salt.parallel.cpu as cpu  # before megatron

from megatron_salt.data.batch import Batches
from megatron_salt.model.head import METRICS
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.train.step import forward_step, place


@torch.no_grad()
def evaluate(
    chunks: Sequence[nn.Module],
    batches: Batches,
    num_batches: int,
    mesh: Mesh,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
) -> dict[str, float]:
    """Per-token means of the head's metrics over `num_batches` global batches. Collective over all ranks; all receive."""
    for chunk in chunks:
        chunk.eval()
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=cpu.device())
    for number in range(num_batches):
        microbatches = [place(microbatch, mesh) for microbatch in batches.fetch(number * global_batch_size)]
        for metrics in run_pipeline(chunks, forward_step, microbatches, mesh, seq_length, micro_batch_size, forward_only=True):
            sums += metrics
    for chunk in chunks:
        chunk.train()
    return means(sums_over_replicas(sums, mesh))


def sums_over_replicas(sums: Tensor, mesh: Mesh) -> Tensor:
    """Add metric sums over data and context parallelism and give them to every stage. Collective over all ranks."""
    dist.all_reduce(sums, group=mesh.groups.dp_cp)
    dist.broadcast(sums, src=dist.get_process_group_ranks(mesh.groups.pp)[-1], group=mesh.groups.pp)
    return sums


def means(sums: Tensor) -> dict[str, float]:
    """Metric sums [metrics] -> {name: mean per token}, and the count of tokens itself under "tokens"."""
    values = dict(zip(METRICS, sums.tolist(), strict=True))
    tokens = values.pop("tokens")
    return {"tokens": tokens, **{name: value / max(tokens, 1.0) for name, value in values.items()}}

"""Microbatches through megatron-core's pipeline schedules, with explicit groups.

The forward step is a stateless function of (chunk, microbatch). A microbatch carries everything that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config

from megatron_salt.parallel.mesh import Mesh

T = TypeVar("T")
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
ForwardStep = Callable[[nn.Module, T], tuple[Tensor, LossFunction]]


def run_pipeline(
    chunks: Sequence[nn.Module],
    forward_step: ForwardStep[T],
    microbatches: Sequence[T],
    mesh: Mesh,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list[Tensor]:
    """Forward pass, and backward pass unless forward_only, of all microbatches.

    Collective over the mesh's pipeline group, and over all its groups when gradients are finalised.
    forward_step(chunk, microbatch) returns (output, loss function). Only the last stage calls the loss function; it returns
    (summed loss, int count of tokens, metric sums). seq_length: length of the whole sequence, before cp and sp split it.
    Returns the metric sums of each microbatch, in order, on ranks of the last stage; an empty list on other ranks.
    """
    config = get_model_config(chunks[0])
    virtual_stages = config.virtual_pipeline_model_parallel_size

    def step(iterator: Iterator[T], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        return forward_step(chunk, next(iterator))

    schedule: Any = get_forward_backward_func(pp_size=mesh.layout.pipeline, vp_size=virtual_stages)
    iterators = [iter(microbatches) for _ in chunks]
    return schedule(
        forward_step_func=step,
        data_iterator=iterators if virtual_stages else iterators[0],
        model=list(chunks) if virtual_stages else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(mesh.groups.pp, config),
        pg_collection=mesh.groups,
    )

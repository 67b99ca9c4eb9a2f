"""Weights and gradients of the whole model from any layout, by GPTModel's names with global layer numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.data.batch import Microbatch
from megatron_salt.model.guidance.target import UNTAUGHT, Targets
from megatron_salt.parallel.pipeline import run_pipeline
from megatron_salt.train.step import Student, forward_input, forward_step, unwrap

TIED_COPY = "copy of the embedding on the last stage"


def whole_gradients(
    student: Student, microbatches: Sequence[Microbatch], targets: Sequence[Targets] | None = None
) -> dict[str, Tensor]:
    """Gradients of the mean loss a token, before clipping, float32. Parameters do not change. Collective over all ranks; all receive.

    targets: what a teacher gives each microbatch on this rank; None: no teacher.

    With embeddings tied over stages, the last stage's copy is returned too, under TIED_COPY: its gradient is the shared one.
    """
    for chunk in student.chunks:
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    targets = [UNTAUGHT] * len(microbatches) if targets is None else targets
    inputs = [forward_input(one, student.mesh, target) for one, target in zip(microbatches, targets, strict=True)]
    run_pipeline(
        student.chunks, forward_step, inputs, student.mesh, student.seq_length, student.micro_batch_size, forward_only=False
    )
    for chunk in student.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather_shards(chunk)
    return whole_tensors(student, lambda param: param.main_grad)


def whole_tensors(student: Student, read: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """What `read` returns for each parameter, in its shape; by default its value. Collective over all ranks; all receive."""
    mine = {}
    for chunk in student.chunks:
        model = unwrap(chunk)
        numbers = {f"decoder.layers.{local}.": layer.layer_number - 1 for local, layer in enumerate(model.decoder.layers)}
        for name, param in model.named_parameters():
            prefix = ".".join(name.split(".")[:3]) + "."
            if prefix in numbers:
                name = f"decoder.layers.{numbers[prefix]}.{name.removeprefix(prefix)}"
            elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
                name = TIED_COPY
            gated = ".linear_fc1." in name and model.config.gated_linear_unit
            mine[name] = _whole(param, read(param).clone(), gated, student.mesh.groups.tp)
    stages: list[dict[str, Tensor]] = [{} for _ in range(student.mesh.groups.pp.size())]
    dist.all_gather_object(stages, mine, group=student.mesh.groups.pp)
    return {name: value for stage in stages for name, value in stage.items()}


def _gather_shards(chunk: torch.nn.Module) -> None:
    """Gather the other ranks' shares of every bucket: under the distributed optimizer each rank has summed only its own."""
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _whole(param: Tensor, value: Tensor, gated: bool, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor, from this tensor-parallel rank's part of it. Collective over tp."""
    parts = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    if not getattr(param, "tensor_model_parallel", False):
        for part in parts:  # what all ranks hold is the same on all
            torch.testing.assert_close(part, value, rtol=1e-5, atol=1e-6, equal_nan=True)
        return value
    if gated:  # each rank holds its share of the gate, then its share of the values
        return torch.cat([half for halves in zip(*(part.chunk(2) for part in parts), strict=True) for half in halves])
    return torch.cat(parts, dim=param.partition_dim)

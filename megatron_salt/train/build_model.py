"""The student: its model in megatron-core's data parallelism, its optimizer and its learning-rate schedule, from our flags."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_salt.config import OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_salt.model.gpt import build_model
from megatron_salt.model.loss_chunk import HeadMemory, chunk_tokens, head_memory
from megatron_salt.model.precision import TORCH, Precision
from megatron_salt.parallel.device import current_device
from megatron_salt.parallel.mesh import Mesh
from megatron_salt.train.plan import RunPlan, schedule_lengths
from megatron_salt.train.step import Student

log = logging.getLogger(__name__)


def wrap_in_ddp(
    chunks: Sequence[nn.Module], parallel: ParallelConfig, mesh: Mesh, precision: Precision = TORCH
) -> list[DistributedDataParallel]:
    """Wrap each chunk so that it has gradient buffers in float32 and a reduction over dp and cp. Not collective."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        fp8_param_gather=precision.fp8_params,
    )
    # Gradients of later chunks are ready long before those of the first. Without overlap, one bucket a chunk is best (as in Megatron).
    return [
        DistributedDataParallel(
            get_model_config(chunk), config, chunk, disable_bucketing=number > 0 and not parallel.overlap_param_gather,
            pg_collection=mesh.groups,
        )
        for number, chunk in enumerate(chunks)
    ]  # fmt: skip


def build_optimizer(
    ddp_chunks: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, parallel: ParallelConfig, dtype: torch.dtype, mesh: Mesh,
    precision: Precision = TORCH,
) -> MegatronOptimizer:  # fmt: skip
    """AdamW over this rank's shard. dtype: of the parameters.

    megatron-core takes the FusedAdam of Transformer Engine where it is installed, else of apex, else ours (parallel/adamw.py). All three
    keep `exp_avg` and `exp_avg_sq` per parameter and one `step` per group, so each can load the checkpoints of the others.
    """
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=precision.fp8_recipe if precision.fp8_params else None,  # read only where weights are kept in FP8
    )
    return get_megatron_optimizer(core, list(ddp_chunks), use_gloo_process_groups=False, pg_collection=mesh.groups)


def install_pipeline_hooks(
    ddp_chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, overlap_grad_reduce: bool
) -> None:
    """Set the functions by which megatron-core's pipeline schedules reach gradients and optimizer. They stand in the model's config."""
    config = get_model_config(ddp_chunks[0])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in ddp_chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def build_scheduler(
    built: MegatronOptimizer, optimizer: OptimizerConfig, train_samples: int, global_batch_size: int
) -> OptimizerParamScheduler:
    """megatron-core's schedule of learning rate and weight decay, which counts samples. train_samples: the length of the run."""
    lengths = schedule_lengths(optimizer, train_samples, global_batch_size)
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    return OptimizerParamScheduler(
        built,
        init_lr=optimizer.lr_warmup_init,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style=optimizer.lr_decay_style,
        start_wd=optimizer.weight_decay if start is None else start,
        end_wd=optimizer.weight_decay if end is None else end,
        wd_incr_steps=train_samples,
        wd_incr_style=optimizer.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=optimizer.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=optimizer.override_opt_param_scheduler,
        wsd_decay_steps=lengths.wsd_decay,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
    )


def build_student(config: RunConfig, plan: RunPlan, vocabulary_size: int, mesh: Mesh, precision: Precision = TORCH) -> Student:
    """The model with its optimizer and schedule, freshly initialised. Collective over all ranks."""
    training, dtype = config.training, dtype_of(config.training)
    rows = config.model.padded_vocabulary_size(vocabulary_size) // mesh.layout.tensor
    device_type = current_device().type
    model = build_model(
        config.model, config.parallel, training.seq_length, vocabulary_size, dtype, chunk_tokens(training, rows, device_type), mesh,
        precision,
    )  # fmt: skip
    chunks = wrap_in_ddp(model, config.parallel, mesh, precision)
    optimizer = build_optimizer(chunks, config.optimizer, config.parallel, dtype, mesh, precision)
    install_pipeline_hooks(chunks, optimizer, config.parallel.overlap_grad_reduce)
    scheduler = build_scheduler(optimizer, config.optimizer, plan.total_samples, plan.global_batch_size)
    if mesh.is_last_stage:
        log.info("output head: %s", memory_of_head(config, plan, vocabulary_size, device_type))
    return Student(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        mesh=mesh,
        seq_length=training.seq_length,
        micro_batch_size=plan.micro_batch_size,
        global_batch_size=plan.global_batch_size,
    )


def memory_of_head(config: RunConfig, plan: RunPlan, vocabulary_size: int, device_type: str) -> HeadMemory:
    """What the output head takes on a rank, for the larger microbatch of the two stages. device_type: cpu or cuda. Pure."""
    rows = config.model.padded_vocabulary_size(vocabulary_size) // config.parallel.tensor_model_parallel_size
    samples = max(plan.micro_batch_size, plan.stage2_micro_batch_size)
    num_tokens = samples * config.training.seq_length // config.parallel.context_parallel_size
    return head_memory(config.training, rows, config.model.hidden_size, num_tokens, device_type)


def dtype_of(training: TrainingConfig) -> torch.dtype:
    """The dtype of parameters and activations, for student and teacher."""
    return torch.bfloat16 if training.bf16 else torch.float32


def count_parameters(student: Student) -> int:
    """Parameters of the whole model, a weight that pipeline stages share counted once. Collective over the model-parallel group."""
    count = sum(
        parameter.numel()
        for chunk in student.chunks
        for parameter in chunk.parameters()
        if not getattr(parameter, "shared", False)
        and (student.mesh.at.tp == 0 or getattr(parameter, "tensor_model_parallel", False))
    )
    total = torch.tensor(count, dtype=torch.int64, device=next(student.chunks[0].parameters()).device)
    dist.all_reduce(total, group=student.mesh.groups.mp)
    return int(total)

"""The arithmetic of a run: how many steps, how many microbatches. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_salt.config import ParallelConfig, TrainingConfig
from megatron_salt.errors import UserError
from megatron_salt.parallel.layout import Layout


@dataclass(frozen=True)
class RunPlan:
    """Counts that hold for the whole run."""

    total_steps: int
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    """Of one replica in one step."""

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.total_steps * self.global_batch_size


def plan_run(training: TrainingConfig, parallel: ParallelConfig, layout: Layout) -> RunPlan:
    """Raise UserError, naming flags and numbers, where the batch cannot be cut as asked or the run has no length."""
    micro, replicas = training.micro_batch_size, layout.data
    global_batch = training.global_batch_size or micro * replicas
    if global_batch % (micro * replicas):
        raise UserError(
            f"--global-batch-size {global_batch} is not divisible by --micro-batch-size {micro} x {replicas} data-parallel replicas"
        )
    microbatches = global_batch // (micro * replicas)
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_stages is not None and microbatches % stages:
        raise UserError(
            f"--num-virtual-stages-per-pipeline-rank {parallel.virtual_stages} needs the {microbatches} microbatches of a replica "
            f"(--global-batch-size {global_batch} / --micro-batch-size {micro} / {replicas} replicas) to be a multiple of "
            f"--pipeline-model-parallel-size {stages}"
        )
    if training.train_samples is not None:
        if training.train_samples % global_batch:
            raise UserError(f"--train-samples {training.train_samples} is not a multiple of --global-batch-size {global_batch}")
        steps = training.train_samples // global_batch
    elif training.train_iters is not None:
        steps = training.train_iters
    else:
        raise UserError("give the run a length: --train-iters or --train-samples")
    return RunPlan(steps, global_batch, micro, microbatches)


def plan_the_rest(plan: RunPlan, training: TrainingConfig, step: int, consumed_samples: int) -> RunPlan:
    """The plan of a run that goes on after `step`. --train-samples is a length in samples: where the steps so far were of another
    --global-batch-size, the run has another number of them. Raises UserError where what is left does not come out even."""
    if training.train_samples is None:
        return plan
    left = max(0, training.train_samples - consumed_samples)
    if left % plan.global_batch_size:
        raise UserError(
            f"--train-samples {training.train_samples} less the {consumed_samples} samples of the first {step} steps leaves {left}, "
            f"which is not a multiple of --global-batch-size {plan.global_batch_size}"
        )
    return replace(plan, total_steps=step + left // plan.global_batch_size)

"""How the model and the batch are divided among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_salt.config.checks import above_zero, at_least, representable
from megatron_salt.errors import UserError

Device = Literal["auto", "cuda", "cpu"]
"""--device of the programs that compute with a model."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are divided among ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages: each holds consecutive layers."""

    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks on each pipeline rank. Above 1 the schedule is interleaved."""

    context_parallel_size: int = 1
    """Ranks that split each sequence."""

    sequence_parallel: bool = False
    """Split activations outside attention and the MLP along the sequence, over the tensor-parallel ranks."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers in the first pipeline stage. The other stages share the rest evenly."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers in the last pipeline stage. The other stages share the rest evenly."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are divided among stages."""

    account_for_loss_in_pipeline_split: bool = False
    """Count the output head and the loss as one layer when layers are divided among stages."""

    use_distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass is already running.
    Needs --use-distributed-optimizer and --overlap-grad-reduce."""

    ddp_bucket_size: int | None = None
    """Parameters in one gradient bucket under --overlap-grad-reduce. Default: megatron-core's choice."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: of whole layers (full), or of core attention alone (selective)."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: equal chunks of layers (uniform), or the first layers of each stage (block)."""

    recompute_num_layers: int | None = None
    """With full recompute: layers in a chunk (uniform), or recomputed layers in a stage (block)."""

    device: Device = "auto"
    """Where every rank computes. auto: on a GPU if the process sees one; a GPU that fails to start ends the run.
    cuda: a rank that sees no GPU ends the run and names its host. cpu: even where there are GPUs."""

    distributed_timeout_minutes: float = 10.0
    """End the run when a collective operation waits longer than this."""

    rendezvous_timeout_minutes: float = 10.0
    """End the run when some ranks have not joined after this time.
    The missing ranks are named every 30 seconds."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_virtual_stages_per_pipeline_rank",
            "context_parallel_size",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "recompute_num_layers",
            "ddp_bucket_size",
        )
        above_zero(self, "distributed_timeout_minutes", "rendezvous_timeout_minutes")
        representable(self)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1, got 1")
        if self.num_virtual_stages_per_pipeline_rank > 1 and self.pipeline_model_parallel_size == 1:
            raise UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_virtual_stages_per_pipeline_rank} needs "
                "--pipeline-model-parallel-size above 1, got 1"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
        if self.recompute_granularity == "full" and (self.recompute_method is None or self.recompute_num_layers is None):
            raise UserError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            raise UserError(
                "--recompute-method and --recompute-num-layers belong to --recompute-granularity full, "
                f"got --recompute-granularity {self.recompute_granularity}"
            )

    @property
    def replica_ranks(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks per pipeline rank as megatron-core spells it: None without interleaving."""
        stages = self.num_virtual_stages_per_pipeline_rank
        return stages if stages > 1 else None

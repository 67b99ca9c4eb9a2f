"""The output layer: from hidden states, the student's and perhaps a teacher's, to the loss; or to logits.

It is a ColumnParallelLinear; when it gets labels, its forward is the fused cross entropy of `loss.py`. It is a submodule of
the model. Call `head(...)`, never `head.forward(...)`: the hooks of DDP on the call wait for the gather of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_salt.errors import UserError
from megatron_salt.model.loss import SoftTarget, fused_linear_cross_entropy
from megatron_salt.model.vocab_parallel import VocabularyShard


class OutputHead(ColumnParallelLinear):
    """`head(hidden, labels, loss_mask, teacher=...)` -> (sum of the loss, metrics); `head(hidden)` -> (logits, None).

    The weight is [padded_vocabulary_size / tp, hidden_size]. With `skip_weight_param_allocation` (tied embeddings) each call gets
    it as an argument. `vocabulary_size` ids are real; the other rows are padding. `chunk_tokens` tokens have logits at one time.
    Raises UserError for float16, and ValueError for features of megatron-core that would bypass this weight gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        padded_vocabulary_size: int,
        *,
        config: ModelParallelConfig,
        init_method: Callable[[Tensor], Any],
        vocabulary_size: int,
        chunk_tokens: int,
        skip_weight_param_allocation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        if config.fp16 or config.params_dtype == torch.float16:
            raise UserError("float16 is not supported: the output head rounds gradients before the loss scale; use --bf16")
        for feature in ("defer_embedding_wgrad_compute", "overlap_moe_expert_parallel_comm"):
            if getattr(config, feature):
                raise ValueError(f"{feature} cannot be combined with the fused output head")
        if not 0 < vocabulary_size <= padded_vocabulary_size:
            raise ValueError(f"vocabulary {vocabulary_size} does not fit {padded_vocabulary_size} rows")
        super().__init__(
            hidden_size,
            padded_vocabulary_size,
            config=config,
            init_method=init_method,
            bias=False,
            skip_weight_param_allocation=skip_weight_param_allocation,
            tp_group=tp_group,
        )
        self.chunk_tokens = chunk_tokens
        self.shard = VocabularyShard(self.tp_group, self.output_size_per_partition, vocabulary_size, self.sequence_parallel)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None, weight: Tensor | None = None,
        teacher: SoftTarget | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Collective over the tensor-parallel group.

        hidden: [s, b, h], with sequence parallelism [s/tp, b, h]. labels: int64 [b, s]. loss_mask: [b, s]; None: all ones.
        weight: [V/tp, h] if embeddings are tied. teacher: the teacher's part of the target; None without a teacher.
        Returns a float32 scalar and float32 [len(METRICS)], with a teacher [len(KD_METRICS)], the same on all ranks of the group.
        Without labels it returns logits [s, b, V/tp] of this rank's rows, padding included, with megatron-core's gradients.
        """
        if labels is None:
            return super().forward(hidden, weight=weight)
        weight = self.weight if weight is None else weight
        assert weight is not None and tuple(weight.shape) == (self.shard.rows, self.input_size)
        if hasattr(weight, "__fsdp_param__"):
            raise ValueError("the fused output head does not work with Megatron-FSDP")
        labels_sb = labels.t().reshape(-1)
        mask_sb = torch.ones_like(labels_sb, dtype=torch.float32) if loss_mask is None else loss_mask.t().reshape(-1).float()
        return fused_linear_cross_entropy(hidden, weight, labels_sb, mask_sb, self.shard, self.chunk_tokens, teacher)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight without `_extra_state`: the parent's is empty, and exists only for Transformer Engine."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}_extra_state", None)
        return state

"""Core attention of the torch layer spec: torch's scaled-dot-product attention, grouped queries, context parallelism.

With context parallelism rank r of n holds chunks r and 2n-1-r of the 2n chunks of each sequence (megatron-core's zigzag). It
gathers keys and values from the other ranks. That is correct on any machine and fast on one rank. For long contexts on GPU
clusters Transformer Engine's ring attention is faster.

With a mask each query head gets a copy of its group's keys and values. Of torch's CUDA kernels flash attention takes no mask, and
memory-efficient attention no groups in the releases up to 2.13; cuDNN's takes both, and is preferred on compute capability 9 and 10
alone. Without the copies other GPUs would write all scores, [b, heads, s, s], to memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

import megatron_salt.parallel.cpu_seam  # noqa: F401  (before megatron)

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_salt.parallel.layout import context_slice


def positions_of(length: int, context: int, rank: int, device: torch.device) -> Tensor:
    """The positions of a sequence that a context-parallel rank holds, in its order: int64 [length / context]."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in context_slice(length, context, rank)])


def attention_mask(documents: Tensor | None, length: int, cp_group: ProcessGroup, device: torch.device) -> Tensor | None:
    """Which keys each query sees: bool [b or 1, 1, length / cp, length], True where it attends; None for plain causal attention.

    documents: int64 [b, length], for each token of the *whole* sequence the number of its document. None: attention crosses
    documents. Keys are in the order in which `CoreAttention` gathers them: rank 0's, rank 1's, and so on.
    """
    context = cp_group.size()
    if documents is None and context == 1:
        return None
    queries = positions_of(length, context, cp_group.rank(), device)
    keys = torch.cat([positions_of(length, context, rank, device) for rank in range(context)])
    mask = (queries[:, None] >= keys[None, :])[None]
    if documents is not None:
        mask = mask & (documents[:, queries, None] == documents[:, None, keys])
    return mask[:, None]


def for_each_head(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values of groups, [s, b, groups, d], for each query head: [s, b, heads, d]. The same tensor where each head is a group."""
    groups = tensor.size(2)
    if groups == heads:
        return tensor
    return tensor[:, :, :, None].expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


class CoreAttention(MegatronModule):
    """Attention of query [s, b, heads, d] over key and value [s, b, groups, d], for this rank's heads and positions."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,  # arguments that later releases of megatron-core add
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.cp_group = pg_collection.cp
        # Without tp_group MegatronModule.sharded_state_dict would take the group of parallel_state.
        self.tp_group = pg_collection.tp
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
        **_: object,
    ) -> Tensor:
        """[s, b, heads * d]. attention_mask: what `attention_mask()` returns; None: causal."""
        assert attention_bias is None and packed_seq_params is None
        if self.cp_group.size() > 1:
            assert attention_mask is not None, "context parallelism needs attention_mask()"
            key = gather_from_sequence_parallel_region(key, tensor_parallel_output_grad=True, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=True, group=self.cp_group)
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks have different heads, so they need different random numbers. With sequence parallelism the
        # transformer block has forked the tracker for the whole layer. A second fork would draw the same numbers again.
        if dropout > 0 and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask, dropout)
        else:
            context = self._attend(query, key, value, attention_mask, dropout)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        if mask is not None:
            key, value = (for_each_head(tensor, query.size(2)) for tensor in (key, value))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip

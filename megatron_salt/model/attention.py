"""Core attention of the torch layer spec: torch's scaled-dot-product attention, grouped queries, context parallelism.

Under context parallelism a rank holds chunks r and 2n-1-r of 2n of each sequence (megatron-core's zigzag) and gathers keys and
values from the others. Right everywhere, quick on one rank; for long contexts on GPU clusters Transformer Engine's ring attention
is the better choice.
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
    """int64 [length / context]: the positions of a sequence that a context-parallel rank holds, in its order."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in context_slice(length, context, rank)])


def attention_mask(documents: Tensor | None, length: int, cp_group: ProcessGroup, device: torch.device) -> Tensor | None:
    """Who may look at whom: bool [b or 1, 1, length / cp, length], True where a query attends; None for plain causal attention.

    documents: int64 [b, length], the number of the document that each token of the *whole* sequence belongs to, or None where
    attention crosses documents. Keys stand in the order in which `CoreAttention` gathers them, rank after rank.
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


class CoreAttention(MegatronModule):
    """Attention over query [s, b, heads, d] and key, value [s, b, groups, d] of this rank's heads and positions."""

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
        **_: object,  # names that later releases of megatron-core add
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None and attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.cp_group = pg_collection.cp
        # MegatronModule.sharded_state_dict asks parallel_state for a tensor-parallel group where a module names none.
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
        """-> [s, b, heads * d]. attention_mask as `attention_mask()` makes it; None means causal."""
        assert attention_bias is None and packed_seq_params is None
        if self.cp_group.size() > 1:
            assert attention_mask is not None, "context parallelism needs attention_mask()"
            key = gather_from_sequence_parallel_region(key, tensor_parallel_output_grad=True, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=True, group=self.cp_group)
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor-parallel ranks, and so must their random numbers. Under sequence parallelism the transformer
        # block has forked the tracker for the whole layer; a fork inside a fork would draw the same numbers twice.
        if dropout > 0 and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask, dropout)
        else:
            context = self._attend(query, key, value, attention_mask, dropout)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )  # fmt: skip

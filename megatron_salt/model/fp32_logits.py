"""float32 logits of one chunk of tokens at a time, and how far two forward passes of one model are apart.

For reductions whose result must not depend on rounding: the rank of a label, or the Kullback-Leibler divergence of the next-token
distributions of two passes. Both passes share the output weight; only their last hidden states differ. The loss rounds its
logits to the model's dtype instead, see loss.py. Sums over tokens are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_salt.model.kernels.passes import Blocks, new_logits, slices
from megatron_salt.model.loss import gather_sequence
from megatron_salt.model.vocab_parallel import VocabularyShard, compare


class Fp32Logits:
    """Multiplies hidden states with an output weight, into buffers that are allocated once."""

    def __init__(self, weight: Tensor, shard: VocabularyShard, chunk_tokens: int, num_buffers: int = 1) -> None:
        """weight: [V/tp, h], this rank's rows, padding included. num_buffers: chunks of logits that exist at one time."""
        # On a CPU no product of bfloat16 numbers has a float32 result, so it gets a float32 copy.
        self._weight = (weight if weight.is_cuda else weight.float())[: shard.real_rows]
        self._buffers = [new_logits(chunk_tokens, shard.real_rows, torch.float32, weight.device) for _ in range(num_buffers)]
        self.blocks = Blocks.of(self._buffers[0])

    def of(self, hidden_nh: Tensor, buffer: int = 0) -> Tensor:
        """float32 [n, real ids of this rank] of hidden_nh [n, h], at most one chunk. The next call with this buffer overwrites it."""
        out = self._buffers[buffer][: hidden_nh.size(0)]
        if self._weight.dtype == torch.float32:
            return torch.mm(hidden_nh.float(), self._weight.t(), out=out)
        return torch.mm(hidden_nh, self._weight.t(), out_dtype=torch.float32, out=out)


@torch.no_grad()
def divergence(
    reference: Tensor, other: Tensor, weight: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(kl, agreement): sums over the tokens that count, float64 scalars. Collective over the tensor-parallel group; all its ranks receive.

    kl: KL(softmax of the reference's logits / temperature || the same of the other's), nats. agreement: tokens with the same most likely
    id. reference, other: [s, b, h], with sequence parallelism (see `shard`) [s/tp, b, h]. weight: [V/tp, h]. All have one dtype, float32
    or bfloat16. mask: float32 [s*b], s-major; a token with 0 does not count. NaN in a token that counts gives NaN.
    """
    assert reference.shape == other.shape and reference.dtype == other.dtype == weight.dtype, (reference.shape, other.shape)
    gathered = [gather_sequence(hidden, shard.group) if shard.sequence_parallel else hidden for hidden in (reference, other)]
    reference_nh, other_nh = (hidden.flatten(0, 1) for hidden in gathered)
    assert reference_nh.size(0) == mask.numel(), (reference_nh.shape, mask.shape)
    chunk_tokens = min(chunk_tokens, mask.numel())
    logits = Fp32Logits(weight, shard, chunk_tokens, num_buffers=2)
    kl, agreement = (torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(2))
    for chunk in slices(mask.numel(), chunk_tokens):
        counts = mask[chunk] > 0
        label_column = shard.column_of(torch.zeros_like(mask[chunk], dtype=torch.int64))  # any label: none is used
        reference_nv, other_nv = (
            logits.of(reference_nh[chunk], buffer=0),
            logits.of(other_nh[chunk], buffer=1).div_(temperature),
        )
        reference_nv.div_(temperature)
        _, comparison = compare(other_nv, reference_nv, 1.0, label_column, shard.group, logits.blocks)
        kl += torch.where(counts, comparison.kl, 0).sum(dtype=torch.float64)
        agreement += torch.where(counts, comparison.agreement, 0).sum(dtype=torch.float64)
    return kl, agreement

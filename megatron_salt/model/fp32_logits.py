"""float32 logits of one chunk of tokens at a time, and how far two forward passes of one model are apart.

For reductions whose result must not depend on rounding: the rank of a label, or the Kullback-Leibler divergence of the next-token
distributions of two passes. Both passes share the output weight; only their last hidden states differ. The loss rounds its
logits to the model's dtype instead, see loss.py. Sums over tokens are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_salt.model.loss import gather_sequence
from megatron_salt.model.vocab_parallel import Blocks, Label, VocabularyShard, compare, slices


class Fp32Logits:
    """An output weight, ready to multiply; and room for the logits of a chunk, made once and kept."""

    def __init__(self, weight: Tensor, shard: VocabularyShard, chunk_tokens: int, num_rooms: int = 1) -> None:
        """weight: [V/tp, h], this rank's rows, padding included. num_rooms: how many chunks of logits live at one time."""
        # Where no product of bfloat16 numbers has a float32 result (on a CPU), a float32 copy stands in.
        self._weight = (weight if weight.is_cuda else weight.float())[: shard.real_rows]
        self._rooms = torch.empty((num_rooms, chunk_tokens, shard.real_rows), device=weight.device)
        self.blocks = Blocks.of(self._rooms[0])

    def of(self, hidden_nh: Tensor, room: int = 0) -> Tensor:
        """float32 [n, real ids of this rank] of at most a chunk of tokens, [n, h]. The next call with this room overwrites it."""
        out = self._rooms[room, : hidden_nh.size(0)]
        if self._weight.dtype == torch.float32:
            return torch.mm(hidden_nh.float(), self._weight.t(), out=out)
        return torch.mm(hidden_nh, self._weight.t(), out_dtype=torch.float32, out=out)


@torch.no_grad()
def divergence(
    reference: Tensor, other: Tensor, weight: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(kl, agreement), float64 scalars: summed over the tokens that count, KL(softmax of the reference's logits / temperature || of the
    other's) in nats, and how many tokens have the same likeliest id. Collective over the tensor-parallel group; all its ranks get both.

    reference, other: [s, b, h], with sequence parallelism (`shard` says) [s/tp, b, h]; weight: [V/tp, h]; all of one dtype,
    float32 or bfloat16. mask: float32 [s*b], s-major; what is 0 does not count. NaN among what counts gives NaN.
    """
    assert reference.shape == other.shape and reference.dtype == other.dtype == weight.dtype, (reference.shape, other.shape)
    gathered = [gather_sequence(hidden, shard.group) if shard.sequence_parallel else hidden for hidden in (reference, other)]
    reference_nh, other_nh = (hidden.flatten(0, 1) for hidden in gathered)
    assert reference_nh.size(0) == mask.numel(), (reference_nh.shape, mask.shape)
    chunk_tokens = min(chunk_tokens, mask.numel())
    logits = Fp32Logits(weight, shard, chunk_tokens, num_rooms=2)
    kl, agreement = (torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(2))
    for chunk in slices(mask.numel(), chunk_tokens):
        counts = mask[chunk] > 0
        label = Label.of(torch.zeros_like(mask[chunk], dtype=torch.int64), shard)  # any one: no label is asked about
        reference_nv, other_nv = logits.of(reference_nh[chunk], room=0), logits.of(other_nh[chunk], room=1).div_(temperature)
        reference_nv.div_(temperature)
        _, comparison = compare(other_nv, reference_nv, 1.0, label, shard.group, logits.blocks)
        kl += torch.where(counts, comparison.kl, 0).sum(dtype=torch.float64)
        agreement += torch.where(counts, comparison.agreement, 0).sum(dtype=torch.float64)
    return kl, agreement

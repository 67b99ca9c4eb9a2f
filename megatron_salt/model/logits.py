"""float32 logits of a model's real ids on this rank, of one chunk of tokens at a time.

For reductions whose result rounding must not decide: a label's rank, or how far two forward passes of one model are apart. The loss
rounds its logits to the model's dtype, see loss.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_salt.model.vocab_parallel import Blocks, VocabularyShard


class WideLogits:
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

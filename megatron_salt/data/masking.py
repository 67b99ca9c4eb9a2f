"""How end-of-document tokens change the loss mask, position ids and attention of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_salt.config import flag
from megatron_salt.errors import UserError


@dataclass(frozen=True)
class Masking:
    """The flags --eod-mask-loss, --reset-position-ids and --reset-attention-mask, and the token they look for."""

    eod: int | None
    eod_mask_loss: bool
    reset_position_ids: bool
    reset_attention_mask: bool

    def __post_init__(self) -> None:
        for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
            if getattr(self, name) and self.eod is None:
                raise UserError(f"{flag(name)} needs an end-of-document token, and the tokenizer has none")

    def of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Masks for `tokens`, int64 [b, L] -> (loss mask float32, position ids int64, document indices int64 or None), each [b, L].

        As in megatron/core/datasets/gpt_dataset.py: an end-of-document token is the last token of its document. With --eod-mask-loss
        the loss does not count where that token is the input.
        """
        loss_mask = np.ones(tokens.shape, np.float32)
        position_ids = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask):
            return loss_mask, position_ids.copy(), None
        is_eod = tokens == self.eod
        if self.eod_mask_loss:
            loss_mask[is_eod] = 0.0
        if self.reset_position_ids:
            starts = np.zeros(tokens.shape, np.int64)  # first position of the token's document
            starts[:, 1:] = np.maximum.accumulate(np.where(is_eod, position_ids + 1, 0), axis=1)[:, :-1]
            position_ids = position_ids - starts
        documents = np.cumsum(is_eod, axis=1) - is_eod if self.reset_attention_mask else None
        return loss_mask, np.ascontiguousarray(position_ids), documents

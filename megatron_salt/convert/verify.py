"""Whether an imported model computes what its own program computes: logits of a prompt, and losses on the reference batch. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_salt.errors import UserError

PROMPT = 16
"""Tokens of the first sequence of the reference batch whose logits are compared."""
TOLERANCE = 1e-4
"""Of a loss, and of the largest logit: float32 sums of a few thousand terms in another order stay far below it."""


@dataclass(frozen=True)
class Outputs:
    """What a model computes on the reference batch."""

    losses: tuple[float, ...]
    """Nats a token, one for each sequence."""
    logits: Tensor
    """float32 [PROMPT or fewer, vocabulary]: of the first tokens of the first sequence."""


def refuse_other_outputs(own: Outputs, theirs: Outputs, where: str) -> None:
    """Raise UserError where the imported model computes something else than transformers."""
    scale = float(theirs.logits.abs().max())
    difference = float((own.logits - theirs.logits).abs().max())
    if not difference <= TOLERANCE * scale:  # not (a <= b) also rejects NaN
        raise UserError(
            f"{where}: the imported model is not what transformers computes: logits up to {scale:.4g} differ by up to {difference:.4g}"
        )
    for loss, their_loss in zip(own.losses, theirs.losses, strict=True):
        if not math.isclose(loss, their_loss, rel_tol=TOLERANCE):
            raise UserError(
                f"{where}: the imported model is not what transformers computes: loss {loss:.6f}, in transformers {their_loss:.6f}"
            )

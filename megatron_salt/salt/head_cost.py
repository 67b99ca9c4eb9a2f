"""Time of the output head on one rank: FLOPs of its products and bytes that its passes move, for one microbatch. Pure.

Softmaxes, metrics and the gradient over the logits do little arithmetic on much memory. On a fast device, or with a small model, they
take a good part of the head's time. The figures follow from the code: `loss.py`, and `kernels/` for both forms of the passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_salt.cards import Rates
from megatron_salt.config.teaching import GateKind

FLOAT32 = 4
"""Bytes of a number of the teacher's logits, of all sums, and of the weight gradient."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The output head's work for one microbatch on one rank."""

    rows: int
    """Vocabulary / tp."""
    hidden: int
    teacher_hidden: int
    tokens: int
    """Tokens of the microbatch on this rank's share of the sequence (all ranks of a tensor-parallel group have the same)."""
    chunk_tokens: int
    """Tokens whose logits exist at one time, at most."""
    itemsize: int
    """Bytes of a number of the student: 2 in bfloat16, 4 in float32."""
    kernels: bool
    """Whether the passes over the logits are fused kernels, not torch's operations."""
    tempered: bool
    """Whether the teacher's temperature is not 1."""
    gate: GateKind | None = None
    """By what --kd-gate chooses tokens; None: all are taught."""


def pass_bytes(shape: HeadShape, taught: bool) -> int:
    """Bytes that the passes over the logits read and write for each logit, b being the itemsize and 4 that of a teacher's logit.

    Kernels: `row_sums` reads the student's logit (b), `into_gradient` reads it and writes the gradient (2 b). Both read the teacher's
    (2 x 4). So 6 in bfloat16, and 14 with a teacher.

    torch's operations, block by block, in float32. `row_sums`: largest (b), difference (b + 4), comparison (8) and its sum (4), exp (8) and
    its sum (4). `into_gradient`: difference (b + 4) and exp (8), and a copy back in bfloat16 (4 + b). A teacher adds to `row_sums` the same
    four passes over its logits (2 x 4 + 16); both differences added, compared and summed (24); exp and its sum (12); its sum at T (4); two
    dot products (2 x 16) and a difference (12); and, if T is not 1, a division and another exp (16). It adds to `into_gradient` a
    difference (8), division and exp (16) and the weighted difference of both (12).

    A gate by the rank compares the teacher's logits with the label's and counts them: 4, in torch's operations 4 + 4 + 4. One by the
    entropy adds a dot product to torch's `row_sums` (16), and nothing to the kernel, which has both numbers at hand. The label's
    probability is there in any case.
    """
    own = shape.itemsize
    if shape.kernels:
        by_rank = FLOAT32 if shape.gate == "rank" else 0
        return 3 * own + (2 * FLOAT32 + by_rank if taught else 0)
    plain = (2 * own + 28) + (own + 12) + (4 + own if own != FLOAT32 else 0)
    if not taught:
        return plain
    gate = {"rank": 12, "entropy": 16, "probability": 0, None: 0}[shape.gate]
    return plain + (24 + 24 + 12 + 4 + 32 + 12) + (16 if shape.tempered else 0) + (8 + 16 + 12) + gate


def head_seconds(shape: HeadShape, rates: Rates, teacher: Rates | None) -> float:
    """Seconds of the head, forward and backward, for one microbatch; in FLOPs if `rates` are FLOPS_ALONE.

    Each of three products (logits, hidden gradient, weight gradient) has 2 tokens V h FLOPs and reads or writes the logits once. Each
    chunk reads the weight in the first two, and reads and writes the float32 weight gradient in the third. That gradient is zeroed (4),
    then read and added to `main_grad` (4 + 8) once a microbatch. teacher: rates of the teacher's product; None: no teacher.
    """
    tokens, own, weight = shape.tokens, shape.itemsize, shape.rows * shape.hidden
    chunks, flops = -(-tokens // shape.chunk_tokens), 2.0 * tokens * weight
    activations = tokens * (shape.rows + shape.hidden) * own
    seconds = 2 * rates.product(flops, chunks * weight * own + activations)
    seconds += rates.product(flops, chunks * weight * 2 * FLOAT32 + activations)
    if teacher is not None:
        weight_t = shape.rows * shape.teacher_hidden
        moved = chunks * weight_t * own + tokens * (shape.teacher_hidden * own + shape.rows * FLOAT32)
        seconds += teacher.product(2.0 * tokens * weight_t, moved)
    moved = tokens * shape.rows * pass_bytes(shape, teacher is not None) + 4 * FLOAT32 * weight
    return seconds + moved / rates.bytes

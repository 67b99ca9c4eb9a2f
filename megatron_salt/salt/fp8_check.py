"""Whether a teacher may compute in FP8: its predictions must stay near those that it makes in bfloat16.

Every replica reads the run's first samples twice, in the way of a training step: first without FP8, then with it. Both passes use the same
weights. The output weight is never in FP8. The measure is the mean over tokens of KL(bfloat16 teacher || FP8 teacher). It is taken at
--kd-teacher-temperature and at 1, and the larger value counts: a low temperature enlarges differences where the teacher hesitates, and
hides them where it is sure. Where the measure is above --teacher-fp8-max-kl, the run is refused before its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_salt.data.batch import Microbatch
from megatron_salt.errors import Look, UserError, stay
from megatron_salt.model import matrix_products
from megatron_salt.model.fp8_teacher import in_bfloat16
from megatron_salt.model.kernels.passes import Blocks, new_logits, slices
from megatron_salt.model.loss import gather_sequence
from megatron_salt.model.vocab_parallel import VocabularyShard, compare
from megatron_salt.parallel.collectives import first_problem
from megatron_salt.parallel.device import current_device
from megatron_salt.salt.teacher import Teacher, TeacherHead

SAMPLES = 4
"""Sequences that are compared, each of the run's --seq-length."""


@dataclass(frozen=True)
class Fidelity:
    """How near a teacher in FP8 is to itself in bfloat16, on fixed samples. The replica with the worst figure counts."""

    kl: float
    """Mean over tokens of KL(bfloat16 || FP8), nats."""
    agreement: float
    """Share of tokens whose likeliest id is the same."""
    tokens: int
    """Tokens that were compared."""
    max_kl: float
    """--teacher-fp8-max-kl. kl is at most this."""

    def __str__(self) -> str:
        return (
            f"teacher in FP8: KL(bfloat16 || FP8) {self.kl:.2e} nats a token on {self.tokens} fixed tokens (--teacher-fp8-max-kl "
            f"{self.max_kl:g}), the same first choice on {self.agreement:.1%}"
        )


def refuse_unfaithful(
    teacher: Teacher, max_kl: float, text: Sequence[Microbatch], head: TeacherHead, look: Look = stay
) -> Fidelity:
    """How near the teacher in FP8 is to itself in bfloat16. Raises UserError, on every rank, where a replica's mean divergence is
    above max_kl (nats a token) or NaN. Collective over all ranks; all get the same result. The teacher does not change.

    text: one sample a microbatch, the same on every rank; tokens of loss mask 0 do not count. The teacher's body must still have its
    bfloat16 weights. look: called before each forward.
    """
    sums = _divergences(teacher, text, head, look)
    tokens, kl, kl_at_1, agreement = sums.unbind(-1)
    kl, agreement = torch.maximum(kl, kl_at_1) / tokens, agreement / tokens  # NaN stays NaN
    worst = next((value for value in kl.tolist() if not value <= max_kl), None)  # not (a <= b) also rejects NaN
    problem = first_problem(None if worst is None else f"{worst:.3g} nats a token")
    if problem is not None:
        raise UserError(
            "the teacher in FP8 is too far from itself in bfloat16: their mean KL divergence on "
            f"{len(text)} samples of the run's text was {problem}, the larger of that at --kd-teacher-temperature "
            f"{teacher.temperature:g} and at 1, above --teacher-fp8-max-kl {max_kl:g}; "
            "take another --teacher-fp8-recipe, or no --teacher-fp8-format"
        )
    extremes = torch.stack([kl.max(), -agreement.min()])  # the worst of this block's replicas; then the worst of all blocks
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    counted = round(sum(float(sample.loss_mask.sum()) for sample in text))
    return Fidelity(kl=float(extremes[0]), agreement=-float(extremes[1]), tokens=counted, max_kl=max_kl)


@torch.no_grad()
def _divergences(teacher: Teacher, text: Sequence[Microbatch], head: TeacherHead, look: Look) -> Tensor:
    """float64 [replicas of the block, 4]: tokens, and sums over them for each of the block's teachers: of the divergence at the run's
    temperature, of that at 1, of the agreement. Tokens are counted once a tp rank of the student, like the sums. Collective over all
    ranks; all of a block receive."""

    def passes() -> list[list[Tensor | None]]:
        hidden = []
        for sample in text:
            look("checking the teacher in FP8")
            hidden.append(teacher.hidden_states([sample] * teacher.replicas, merge=1))
        return hidden

    with in_bfloat16(teacher.body):
        in_bf16 = passes()
    in_fp8 = passes()
    sums = torch.zeros(teacher.replicas, 4, dtype=torch.float64, device=current_device())
    positions = head.own_positions()
    for sample, of_sample_bf16, of_sample_fp8 in zip(text, in_bf16, in_fp8, strict=True):
        counts = sample.loss_mask[0, positions].to(current_device())
        for replica, (reference, other) in enumerate(zip(of_sample_bf16, of_sample_fp8, strict=True)):
            if reference is not None and other is not None and teacher.weight is not None:
                passed = (reference, other, teacher.weight, counts, head.shared_shard, head.chunk_tokens)
                kl, agreement = divergence(*passed, teacher.temperature)
                kl_at_1, _ = divergence(*passed, 1.0)
                sums[replica] += torch.stack([counts.sum(dtype=torch.float64), kl, kl_at_1, agreement])
    dist.all_reduce(sums, group=teacher.block_group)
    return sums


@torch.no_grad()
def divergence(
    reference: Tensor, other: Tensor, weight: Tensor, mask: Tensor, shard: VocabularyShard, chunk_tokens: int, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(kl, agreement): sums over the tokens that count, float64 scalars. Collective over the tensor-parallel group; all its ranks receive.

    kl: KL(softmax of the reference's logits / temperature || the same of the other's), nats. agreement: tokens with the same most likely
    id. reference, other: [s, b, h], with sequence parallelism (see `shard`) [s/tp, b, h]. weight: [V/tp, h]. All have one dtype, float32
    or bfloat16; logits are float32. mask: float32 [s*b], s-major; a token with 0 does not count. NaN in a token that counts gives NaN.
    """
    assert reference.shape == other.shape and reference.dtype == other.dtype == weight.dtype, (reference.shape, other.shape)
    gathered = [gather_sequence(hidden, shard.group) if shard.sequence_parallel else hidden for hidden in (reference, other)]
    reference_nh, other_nh = (hidden.flatten(0, 1) for hidden in gathered)
    assert reference_nh.size(0) == mask.numel(), (reference_nh.shape, mask.shape)
    chunk_tokens, weight = min(chunk_tokens, mask.numel()), weight[: shard.real_rows]
    reference_buffer, other_buffer = (new_logits(chunk_tokens, weight.size(0), torch.float32, weight.device) for _ in range(2))
    blocks = Blocks.of(reference_buffer)
    kl, agreement = (torch.zeros((), dtype=torch.float64, device=weight.device) for _ in range(2))
    for chunk in slices(mask.numel(), chunk_tokens):
        counts = mask[chunk] > 0
        label_column = shard.column_of(torch.zeros_like(mask[chunk], dtype=torch.int64))  # any label: none is used
        reference_nv = matrix_products.logits(reference_nh[chunk], weight, reference_buffer[: counts.numel()])
        other_nv = matrix_products.logits(other_nh[chunk], weight, other_buffer[: counts.numel()])
        _, comparison = compare(
            other_nv.div_(temperature), reference_nv.div_(temperature), 1.0, label_column, shard.group, blocks
        )
        kl += torch.where(counts, comparison.kl, 0).sum(dtype=torch.float64)
        agreement += torch.where(counts, comparison.agreement, 0).sum(dtype=torch.float64)
    return kl, agreement
